//! `fpenet check`: a device against a reference folder written by PyTorch.

use std::path::PathBuf;
use std::process::ExitCode;

use fpenet::reference;

use super::args::DeviceArgs;
use crate::say;

/// Options of `fpenet check`.
#[derive(clap::Args)]
pub struct Args {
    /// Reference folder (tools/dump_reference.py writes them)
    #[arg(long, value_name = "DIR")]
    pub reference: PathBuf,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command: exit code 0 when every comparison passes, 1 otherwise.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let precision = args.device.precision;
    let report = reference::check(&args.reference, precision, &|| args.device.open())?;

    say!("{} against {}, {}", report.device, args.reference.display(), precision.name())?;
    let width = report.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
    let header = ["max abs", "relative L2", "tolerance"];
    say!("{:width$}  {:>9}  {:>11}  {:>9}  verdict", "", header[0], header[1], header[2])?;
    for row in &report.rows {
        let comparison = row.comparison;
        // Where the reference is (nearly) zero the error is absolute, see the SPEC.
        let mark = if comparison.absolute { "*" } else { " " };
        say!(
            "{:width$}  {:>9.2e}  {:>10.2e}{mark}  {:>9.0e}  {}",
            row.name,
            comparison.max_abs,
            comparison.error,
            row.tolerance,
            if row.passed() { "pass" } else { "MISS" }
        )?;
    }
    if report.rows.iter().any(|row| row.comparison.absolute) {
        say!("* not relative: norm of the difference (the reference is zero), or share of pixels")?;
    }
    for skipped in &report.skipped {
        say!("skipped: {skipped}")?;
    }
    let (rows, misses) = (report.rows.len(), report.misses());
    if report.passed() {
        say!("PASS: {rows} comparisons within tolerance")?;
        Ok(ExitCode::SUCCESS)
    } else {
        say!("FAIL: {misses} of {rows} comparisons out of tolerance")?;
        Ok(ExitCode::FAILURE)
    }
}
