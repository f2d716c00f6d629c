//! Exposes a guest's ports behind a Unix socket: `CONNECT <port>\n`, answered `OK <port>\n`, then bytes in both
//! directions. So clients of the Unix-socket form of vsock can reach a guest over the rings.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::host::Host;
use crate::link::read_line;

/// Connections at once; further ones wait for a place.
const CONNECTIONS_MAX: usize = 1024;
/// Longest wait for the line that asks for a port.
const LINE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after an accept that failed, for instance for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves connections to the guest `peer` at `path`, forever. If the guest's kernel refuses, the bridge hangs up; if
/// the guest is not there (yet), it answers with a line that is not OK.
///
/// # Errors
/// If the socket cannot be bound.
pub async fn serve(host: Host, peer: u32, path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let host = Arc::new(host);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let host = host.clone();
                tokio::spawn(async move {
                    // Whatever ends it, both sides are closed.
                    let _ = carry(&host, peer, stream).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn carry(host: &Host, peer: u32, mut stream: UnixStream) -> io::Result<()> {
    let line = tokio::time::timeout(LINE_TIMEOUT, read_line(&mut stream)).await??;
    let port = line.strip_prefix("CONNECT ").and_then(|p| p.parse().ok());
    let Some(port) = port else {
        return stream.write_all(b"expected CONNECT <port>\n").await;
    };
    match host.connect(peer, port).await {
        Ok(mut guest) => {
            stream.write_all(format!("OK {port}\n").as_bytes()).await?;
            copy_bidirectional(&mut stream, &mut guest).await?;
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(_) => stream.write_all(b"no link to the guest\n").await,
    }
}
