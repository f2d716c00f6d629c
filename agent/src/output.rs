//! What the workload prints goes through the agent into a log of bounded size.

use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::AsyncReadExt;

/// Size at which the log is begun anew, bytes. What was there is kept once, beside it.
pub const LOG_MAX_BYTES: u64 = 4 << 20;
/// Bytes read from the workload at once.
const READ_BYTES: usize = 16 * 1024;

/// Copies what comes out of `pipe` to standard error until the pipe ends. When standard error is a
/// regular file it is kept below [`LOG_MAX_BYTES`]; its earlier content goes to `rotated`.
pub async fn relay(pipe: OwnedFd, rotated: Option<std::path::PathBuf>) {
    let Ok(mut pipe) = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe) else {
        return;
    };
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                // A full disk loses lines of a log; it must not stop the workload.
                let _ = io::stderr().write_all(&buffer[..count]);
                if let Some(rotated) = &rotated {
                    let _ = rotate(rotated);
                }
            }
        }
    }
}

/// Begins the log anew when it has grown too large. The descriptor stays: others hold it too.
fn rotate(rotated: &std::path::Path) -> io::Result<()> {
    let mut log = std::fs::File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let about = log.metadata()?;
    if !about.is_file() || about.len() < LOG_MAX_BYTES {
        return Ok(());
    }
    // The shared descriptor is write-only: read it again by its name in /proc.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&log));
    std::fs::copy(path, rotated)?;
    log.set_len(0)?;
    log.seek(SeekFrom::Start(0))?;
    Ok(())
}
