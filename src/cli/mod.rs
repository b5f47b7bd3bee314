//! Commands of the binary, a file each; what they share: dispatch, error reports, output.

mod args;
mod bench;
mod check;
mod destination;
mod devices;
mod eval;
mod export;
mod export_predictions;
mod import;
mod init;
mod profile;
mod progress;
mod reproduce;
mod run;
mod segment;
mod selftest;
mod stream;
mod summary;
mod train;
mod tune;
mod view;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Real-time street-scene segmentation with FPENet (Liu & Yin, BMVC 2019).
#[derive(Parser)]
#[command(name = "fpenet", version, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 success, 1 the work failed, 2 wrong usage.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Segment photos: label maps, colour masks and overlays with a legend
    Segment(segment::Args),
    /// Segment video: frames from a pipe, labels or overlays into a pipe
    Stream(stream::Args),
    /// Measure a model on a data set: mIoU, IoU per class, global accuracy
    Eval(eval::Args),
    /// Write the label PNGs of a split, as the Cityscapes test server takes them
    ExportPredictions(export_predictions::Args),
    /// Train a model
    Train(Box<train::Args>),
    /// Make a table of the paper: train, count or time what it compares
    Reproduce(Box<reproduce::Args>),
    /// Compare a device with a reference folder written by PyTorch
    Check(check::Args),
    /// Run a model on a normalised NumPy array and write the logits
    Run(run::Args),
    /// Write a model file with initial weights
    Init(init::Args),
    /// Write a model as an ONNX file, for ONNX Runtime, TensorRT, OpenVINO
    Export(export::Args),
    /// Make a model file from PyTorch's weights (safetensors or npz)
    Import(Box<import::Args>),
    /// Print the layers of a network with parameters, FLOPs and receptive fields
    Summary(summary::Args),
    /// Measure latency and throughput
    Bench(bench::Args),
    /// Measure the variants of the GPU kernels on this card and keep the fastest
    Tune(Box<tune::Args>),
    /// List the devices that can run the network
    Devices(devices::Args),
    /// Compare every operator of a GPU with the CPU on random inputs
    Selftest(selftest::Args),
    /// Serve a page on this machine that segments photos dropped on it
    View(view::Args),
}

/// Parses the command line, runs the command, and reports an error as one line on stderr.
/// Exit codes: 0 success, 1 the work failed, 2 wrong usage.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return report_usage(&error),
    };
    fpenet::backend::gpu::cuda::on_compiling(|gpu| {
        line("note", &format!("compiling kernels for {gpu}, once per driver ..."));
    });
    let result = match cli.command {
        Command::Segment(args) => segment::run(args),
        Command::Stream(args) => stream::run(args),
        Command::Eval(args) => eval::run(args),
        Command::ExportPredictions(args) => export_predictions::run(args),
        Command::Train(args) => train::run(*args),
        Command::Reproduce(args) => reproduce::run(*args),
        Command::Check(args) => check::run(args),
        Command::Run(args) => run::run(args),
        Command::Init(args) => init::run(args),
        Command::Export(args) => export::run(args),
        Command::Import(args) => import::run(*args),
        Command::Summary(args) => summary::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Tune(args) => tune::run(*args),
        Command::Devices(args) => devices::run(args),
        Command::Selftest(args) => selftest::run(args),
        Command::View(args) => view::run(args),
    };
    result.unwrap_or_else(|error| {
        report(&message(&error));
        ExitCode::from(exit_code(&error))
    })
}

/// `println!` that returns an `io::Result` instead of panicking, for commands whose results never
/// go to standard output; the others write to the [`destination::Messages`] they are given.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { writeln!($crate::cli::destination::Messages::Stdout, $($arg)*) };
}

/// `error: ...` on stderr, on one line whatever the message holds.
pub fn report(message: &str) {
    line("error", message);
}

/// `warning: ...` on stderr, likewise.
pub fn warn(message: &str) {
    line("warning", message);
}

fn line(kind: &str, message: &str) {
    let line = message.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty());
    let line = line.collect::<Vec<_>>().join(" ");
    // What a user typed or a file holds must not steer the terminal.
    let line: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    // Where stderr is closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "{kind}: {line}");
}

/// The error with its causes, leaving out causes that the text already quotes.
pub fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// 2 for wrong usage, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let ours = error.chain().find_map(|cause| cause.downcast_ref::<fpenet::Error>());
    ours.map_or(1, fpenet::Error::exit_code)
}

/// Clap's own errors: help and version go out as they are, a mistake becomes one line.
fn report_usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion,
    };
    let shown = [DisplayHelp, DisplayVersion, DisplayHelpOnMissingArgumentOrSubcommand];
    if shown.contains(&error.kind()) {
        let printed = error.print().and_then(|()| io::stdout().flush());
        return match printed {
            // Where stderr is closed there is nobody to tell.
            _ if error.use_stderr() => ExitCode::from(2),
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                report(&format!("stdout: cannot write: {e}"));
                ExitCode::FAILURE
            }
            // A reader that has gone away is no error.
            _ => ExitCode::SUCCESS,
        };
    }
    let rendered = error.render().to_string();
    let kept = rendered.split("\n\n").take_while(|part| !part.starts_with("Usage:"));
    let kept = kept.filter(|part| !part.starts_with("For more information"));
    let text = kept.map(str::trim).collect::<Vec<_>>().join("; ");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let name = std::env::args().nth(1).unwrap_or_default();
    let command = match Cli::command().find_subcommand(&name) {
        Some(known) => format!("fpenet {}", known.get_name()),
        None => "fpenet".to_string(),
    };
    report(&format!("{text} (see '{command} --help')"));
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn messages_name_every_cause_once() {
        let cause = io::Error::from(io::ErrorKind::NotFound);
        let ours = fpenet::Error::io("cannot read", "a.npy", cause);
        let error = anyhow::Error::new(ours).context("loading the input");
        assert_eq!(message(&error), "loading the input: a.npy: cannot read: entity not found");
        assert_eq!(exit_code(&error), 1);
        let usage = anyhow::Error::new(fpenet::Error::Usage("wrong".into())).context("context");
        assert_eq!(exit_code(&usage), 2);
    }
}
