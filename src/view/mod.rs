//! `fpenet view`: a page on this machine's loopback interface that segments photos.
//!
//! `routes` answers requests, `worker` runs the network on a thread of its own, `page` holds
//! the files of the page, `guard` refuses what does not come from that page. Everything that a
//! request can use up has a bound: connections, waiting photos, bytes, time.

mod guard;
mod page;
mod routes;
mod worker;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::sync::Semaphore;

use crate::error::{Error, Result};
use crate::model::Model;
use crate::segment::Settings;
use routes::Shared;
use worker::Worker;

/// Largest photo file that is taken, in bytes.
pub const MAX_UPLOAD: usize = 64 << 20;
/// Photos that are uploaded, wait or are worked on at the same time; one more is told to come back.
pub const MAX_PHOTOS: usize = 4;
/// Open connections; more wait until one closes.
const MAX_CONNECTIONS: usize = 64;
/// For the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For what is still being answered when the server is told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A server that holds its address and its device, and answers once it runs.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
    worker: Worker,
}

impl Server {
    /// Takes the address (port 0: any free one) and opens the device.
    ///
    /// # Errors
    /// [`Error::Usage`] for an address that is not loopback: photos are private, and nothing here
    /// tells one visitor from another. [`Error::Failed`] where the port is taken; whatever
    /// opening the device reports.
    pub fn new(model: Model, settings: Settings, address: SocketAddr) -> Result<Server> {
        check_loopback(address.ip())?;
        let failed = |e: std::io::Error| {
            let remedy = match e.kind() {
                std::io::ErrorKind::AddrInUse => "; choose another --port (0: any free one)",
                _ => "",
            };
            Error::Failed(format!("{address}: cannot listen: {e}{remedy}"))
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let model = Arc::new(model);
        let worker = Worker::start(model.clone(), settings)?;
        let shared = Arc::new(Shared::new(address, &model, &worker));
        Ok(Server { listener, address, shared, worker })
    }

    /// Where the page is.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// The device: kind as on the command line, and in words.
    pub fn device(&self) -> (&'static str, &str) {
        self.worker.device()
    }

    /// Answers requests until the process gets SIGINT or SIGTERM; what is being answered then
    /// gets a few seconds to finish.
    ///
    /// # Errors
    /// [`Error::Failed`] where the system refuses the means to serve (descriptors, threads).
    pub fn run(self) -> Result<()> {
        let failed = |e: std::io::Error| Error::Failed(format!("{}: {e}", self.address));
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let finished = runtime.block_on(serve(self.listener, &self.shared)).map_err(failed)?;
        drop(runtime);
        if finished {
            drop(self.shared);
            self.worker.finish();
        }
        Ok(())
    }
}

/// Refuses an address that other machines can reach.
///
/// # Errors
/// [`Error::Usage`] with what to do instead.
pub fn check_loopback(address: IpAddr) -> Result<()> {
    if address.is_loopback() {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "host: expected a loopback address (127.0.0.1 or ::1), found {address}; from another \
         machine use a tunnel (ssh -L 8010:127.0.0.1:8010 HOST)"
    )))
}

/// Whether everything was answered by the end.
async fn serve(listener: TcpListener, shared: &Arc<Shared>) -> std::io::Result<bool> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut stop = pin!(stop_signal()?);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    loop {
        let accept = async {
            let slot = connections.clone().acquire_owned().await;
            (listener.accept().await, slot)
        };
        let (accepted, slot) = tokio::select! {
            accepted = accept => accepted,
            () = &mut stop => break,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, or a client that is gone already: neither ends the server.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let shared = shared.clone();
        let service = service_fn(move |request| {
            let shared = shared.clone();
            async move { Ok::<_, std::convert::Infallible>(routes::respond(&shared, request).await) }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            let _ = connection.await; // a client that went away is its own affair
            drop(slot);
        });
    }
    drop(listener);
    Ok(tokio::time::timeout(GRACE, graceful.shutdown()).await.is_ok())
}

/// Resolves at the first SIGINT or SIGTERM.
#[cfg(unix)]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_are_served() {
        for address in ["127.0.0.1", "127.8.9.1", "::1"] {
            check_loopback(address.parse().unwrap()).unwrap();
        }
        for address in ["0.0.0.0", "192.168.1.5", "::", "fe80::1", "8.8.8.8"] {
            let error = check_loopback(address.parse().unwrap()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(address), "{error}");
        }
    }
}
