//! `fpenet selftest`: every operator of a device against the CPU.

use std::process::ExitCode;

use fpenet::selftest;

use super::args::DeviceArgs;
use crate::say;

/// Options of `fpenet selftest`.
#[derive(clap::Args)]
pub struct Args {
    /// Seed of the random inputs [default: another one every time, printed]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command: exit code 0 when every operator is within its tolerance, 1 otherwise.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let precision = args.device.precision;
    let seed = args.seed.unwrap_or_else(selftest::fresh_seed);
    let report = selftest::run(precision, seed, &|| args.device.open())?;
    say!("{}, {}, seed {}", report.device, precision.name(), report.seed)?;
    let width = report.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
    say!("{:width$}  {:>5}  {:>9}  {:>9}  verdict", "", "cases", "error", "tolerance")?;
    for row in &report.rows {
        let verdict = if row.passed() { "pass".into() } else { format!("MISS at {}", row.place) };
        say!(
            "{:width$}  {:>5}  {:>9.2e}  {:>9.0e}  {verdict}",
            row.name,
            row.cases,
            row.worst.error,
            row.tolerance
        )?;
    }
    let rows = report.rows.len();
    if report.passed() {
        say!("PASS: {rows} operators and passes within tolerance of the CPU")?;
        Ok(ExitCode::SUCCESS)
    } else {
        say!("FAIL: {} of {rows} operators and passes out of tolerance", report.misses())?;
        Ok(ExitCode::FAILURE)
    }
}
