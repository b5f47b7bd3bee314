//! `fpenet view`: a page on this machine that segments photos.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use fpenet::view::{self, Server};

use super::args::{DeviceArgs, ModelArgs};
use crate::say;

/// Options of `fpenet view`.
#[derive(clap::Args)]
#[command(after_help = "Prints the address of the page and serves it until Ctrl-C. Only this \
    machine can reach it, and photos do not leave it.")]
pub struct Args {
    /// Port; 0 takes any free one
    #[arg(long, value_name = "N", default_value_t = 8010)]
    pub port: u16,
    /// Loopback address to serve on: 127.0.0.1 or ::1
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", value_parser = host)]
    pub host: IpAddr,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Open the page in the browser
    #[arg(long)]
    pub open: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// An address; `localhost` is 127.0.0.1.
fn host(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        _ => text.parse().map_err(|_| "expected 127.0.0.1 or ::1".to_string()),
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    view::check_loopback(args.host)?;
    let model = args.model.load()?;
    let model_line = args.model.explain(&model);
    let server = Server::new(model, args.device.settings(), SocketAddr::new(args.host, args.port))?;
    say!("device   {}", args.device.explain(server.device()))?;
    say!("model    {model_line}")?;
    say!("page     {} (Ctrl-C ends)", server.url())?;
    std::io::stdout().flush()?;
    if args.open
        && let Err(e) = open::that_detached(server.url())
    {
        // The page works all the same.
        super::report(&format!("cannot open a browser: {e}; open {} yourself", server.url()));
    }
    server.run()?;
    say!("stopped")?;
    Ok(ExitCode::SUCCESS)
}
