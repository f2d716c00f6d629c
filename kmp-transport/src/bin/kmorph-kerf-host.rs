//! Carries vsock to one QEMU guest over shared memory: the host side of kerf-vsock, for guests with `kerf-vsock.ko`.
//! It replaces `vhost-device-vsock`, which serves guests with virtio-vsock.
//!
//! ```text
//! kmorph-kerf-host --socket <for QEMU's ivshmem-doorbell device> --uds-path <CONNECT here>
//! ```
//!
//! The device has [`VECTORS`] vectors. The guest is peer 1, CID 3; the host is peer 0, CID 2.

use std::path::PathBuf;
use std::process::ExitCode;

use kmorph_kerf_ring::Geometry;
use kmp_transport::kerf::{DoorbellServer, GUEST, Host, VECTORS, serve};

/// The host and the guest.
const PEERS: u32 = 2;
/// Slots of each ring, and bytes of its byte ring.
const SLOTS: u32 = 256;
const BYTES: u32 = 1024 * 1024;

const USAGE: &str = "usage: kmorph-kerf-host --socket PATH --uds-path PATH";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kmorph-kerf-host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let (mut socket, mut uds_path) = (None, None);
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        let place = match word.to_str() {
            Some("--socket") => &mut socket,
            Some("--uds-path") => &mut uds_path,
            Some("--version") => {
                println!("kmorph-kerf-host {}", env!("CARGO_PKG_VERSION"));
                return Ok(());
            }
            _ => return Err(USAGE.into()),
        };
        *place = words.next().map(PathBuf::from);
    }
    let (Some(socket), Some(uds_path)) = (socket, uds_path) else {
        return Err(USAGE.into());
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let geometry = Geometry::new(PEERS, SLOTS, BYTES).ok_or("impossible measures")?;
        let server = DoorbellServer::new(geometry)?;
        debug_assert_eq!(server.vectors(), VECTORS);
        let host = Host::new(server.clone())?;
        let _listening = server.listen(GUEST, &socket)?;
        serve(host, GUEST, &uds_path).await?;
        Ok(())
    })
}
