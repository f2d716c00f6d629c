//! Runs in a guest whose vsock is measured, as its workload. It serves the listening socket that it was given.
//! The first byte of a connection says what is done with it:
//!
//! ```text
//! e   every 80 bytes that come go back
//! s   a count of bytes follows (u64, little-endian); so many are sent
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

/// Bytes of a message that goes back.
const MESSAGE_BYTES: usize = 80;
/// Bytes of one write of a stream.
const WRITE_BYTES: usize = 64 * 1024;

fn main() {
    // SAFETY: called once, first of all.
    let listeners = unsafe { take_listeners() }.unwrap();
    let (_, listener) = listeners.into_iter().next().unwrap();
    loop {
        let accepted = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the kernel has just made it for us.
        let socket = unsafe { OwnedFd::from_raw_fd(accepted) };
        std::thread::spawn(move || serve(File::from(socket)));
    }
}

/// Ends with the connection.
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
