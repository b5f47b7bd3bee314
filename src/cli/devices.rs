//! `fpenet devices`: what can run the network here.

use std::process::ExitCode;

use crate::say;

/// Options of `fpenet devices`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    for device in fpenet::device::list() {
        let state = if device.available { "available" } else { "not available" };
        let text = [device.name, device.note].join(" ");
        say!("{:<9} {state:<13} {}", device.kind, text.trim())?;
    }
    Ok(ExitCode::SUCCESS)
}
