//! The workload of a guest whose vsock is measured. It serves the listening socket that it inherits. The first byte of
//! a connection selects the mode:
//!
//! ```text
//! e   echoes every 80 bytes
//! s   a count of bytes follows (u64, little-endian); the program sends that number of bytes
//! ```

#![allow(
    clippy::unwrap_used,
    reason = "what cannot be served cannot be measured"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kmorph_workload::activation::take_listeners;
use nix::sys::socket::{SockFlag, accept4};

/// Size of an echoed message, bytes.
const MESSAGE_BYTES: usize = 80;
/// Size of one write of a stream, bytes.
const WRITE_BYTES: usize = 64 * 1024;

fn main() {
    // SAFETY: called once, before any other code.
    let listeners = unsafe { take_listeners() }.unwrap();
    let (_, listener) = listeners.into_iter().next().unwrap();
    loop {
        let accepted = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the kernel has just created this descriptor for this call.
        let socket = unsafe { OwnedFd::from_raw_fd(accepted) };
        std::thread::spawn(move || serve(File::from(socket)));
    }
}

/// Serves a connection until it ends.
fn serve(mut socket: File) -> Option<()> {
    let mut what = [0];
    socket.read_exact(&mut what).ok()?;
    match &what {
        b"e" => loop {
            let mut message = [0; MESSAGE_BYTES];
            socket.read_exact(&mut message).ok()?;
            socket.write_all(&message).ok()?;
        },
        _ => {
            let mut count = [0; 8];
            socket.read_exact(&mut count).ok()?;
            let mut left = usize::try_from(u64::from_le_bytes(count)).ok()?;
            let bytes = vec![0; WRITE_BYTES];
            while left > 0 {
                let len = left.min(WRITE_BYTES);
                socket.write_all(&bytes[..len]).ok()?;
                left -= len;
            }
            Some(())
        }
    }
}
