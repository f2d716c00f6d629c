//! The log: the agent's own lines and the workload's output, written by a separate thread.
//!
//! ```text
//!  agent's lines ──▶ LINES_MAX, then dropped and counted ──┐
//!                                                          ├──▶ one queue ──▶ thread ──▶ standard error
//!  workload's output ──▶ PIECES_MAX, then the pipe fills ──┘
//! ```
//!
//! Invariant: once the agent serves, its other threads never write to the log, and take no lock that is held across a
//! write. So the agent answers heartbeats even if the disk or console behind the log blocks.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kmorph_launch::AgentConfig;
use slog::{Drain, Logger, o};
use tokio::io::AsyncReadExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Size at which the log is rotated, bytes. One previous log is kept next to it.
pub const LOG_MAX_BYTES: u64 = 4 << 20;
/// Lines of the agent that wait to be written.
const LINES_MAX: usize = 1024;
/// Pieces of the workload's output that wait to be written.
const PIECES_MAX: usize = 16;
/// Bytes of such a piece.
const PIECE_BYTES: usize = 16 * 1024;
/// Longest time that the agent's end waits until everything is written.
const END_MAX: Duration = Duration::from_secs(2);

/// A logger that writes each line to `to`, once.
pub fn logger(config: &AgentConfig, to: impl Write + Send + 'static) -> Logger {
    let decorator = slog_term::PlainSyncDecorator::new(to);
    let drain = slog_term::FullFormat::new(decorator)
        .use_utc_timestamp()
        .build()
        // A failed write is ignored: there is nowhere to report the failure.
        .ignore_res();
    let name = config.instance.to_string();
    let values = o!("instance" => name, "generation" => config.generation);
    Logger::root(drain, values)
}

/// Starts the log's thread, which begins with the CPUs and the niceness of its caller. The thread writes to `out`; a
/// regular file is kept below [`LOG_MAX_BYTES`], and its earlier content goes to `rotated`.
///
/// # Errors
/// The system's.
pub fn start(out: OwnedFd, rotated: Option<PathBuf>) -> io::Result<(Log, Written)> {
    let (queue, items) = mpsc::channel();
    let out = Out {
        file: File::from(out),
        rotated,
    };
    let writer = thread::Builder::new().name("log".to_owned());
    writer.spawn(move || out.write_all_of(&items))?;
    let log = Log {
        queue,
        lines: Arc::new(Semaphore::new(LINES_MAX)),
        pieces: Arc::new(Semaphore::new(PIECES_MAX)),
        dropped: Arc::default(),
    };
    let written = Written {
        log: log.clone(),
        patience: END_MAX,
    };
    Ok((log, written))
}

/// An entry in the queue of the log's thread. The permit bounds the queue.
enum Item {
    Piece(Vec<u8>, OwnedSemaphorePermit),
    /// Write everything before this, then notify the sender.
    End(mpsc::Sender<()>),
}

/// The log of this process. Clones are the same log; as a writer, the log takes whole lines and never waits.
#[derive(Clone, Debug)]
pub struct Log {
    queue: mpsc::Sender<Item>,
    lines: Arc<Semaphore>,
    pieces: Arc<Semaphore>,
    /// Lines dropped since one was taken.
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Copies data from `pipe` to the log, until the pipe ends. While the log blocks, the pipe fills, as if the
    /// workload wrote to the log itself: its output is neither dropped nor kept in memory.
    pub async fn relay(self, pipe: OwnedFd) {
        let Ok(mut pipe) = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe) else {
            return;
        };
        // Allocated once and copied from: a piece keeps no more memory than it has bytes.
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            let count = match pipe.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(count) => count,
            };
            let Ok(room) = Arc::clone(&self.pieces).acquire_owned().await else {
                return;
            };
            let piece = Item::Piece(buffer[..count].to_vec(), room);
            if self.queue.send(piece).is_err() {
                return;
            }
        }
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let Ok(room) = Arc::clone(&self.lines).try_acquire_owned() else {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        };
        let mut bytes = match self.dropped.swap(0, Ordering::Relaxed) {
            0 => Vec::with_capacity(line.len()),
            lines => format!("{lines} lines dropped: writing the log blocked\n").into_bytes(),
        };
        bytes.extend_from_slice(line);
        let sent = self.queue.send(Item::Piece(bytes, room));
        sent.map(|()| line.len())
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits, when dropped, until the log so far is written, [`END_MAX`] at most.
#[derive(Debug)]
pub struct Written {
    log: Log,
    patience: Duration,
}

impl Drop for Written {
    fn drop(&mut self) {
        let (done, all) = mpsc::channel();
        if self.log.queue.send(Item::End(done)).is_ok() {
            // A log that stands still to the end loses its last lines.
            let _ = all.recv_timeout(self.patience);
        }
    }
}

/// The end of the log's thread.
struct Out {
    file: File,
    rotated: Option<PathBuf>,
}

impl Out {
    fn write_all_of(mut self, items: &mpsc::Receiver<Item>) {
        while let Ok(item) = items.recv() {
            match item {
                Item::Piece(bytes, _room) => {
                    // A full disk loses lines of a log; it must not stop the workload.
                    let _ = self.file.write_all(&bytes);
                    if let Some(rotated) = &self.rotated {
                        let _ = rotate(&mut self.file, rotated);
                    }
                }
                Item::End(done) => {
                    let _ = done.send(());
                }
            }
        }
    }
}

/// Begins the log anew when it has grown too large. The descriptor stays: others hold it too.
fn rotate(log: &mut File, rotated: &Path) -> io::Result<()> {
    let about = log.metadata()?;
    if !about.is_file() || about.len() < LOG_MAX_BYTES {
        return Ok(());
    }
    // The shared descriptor is write-only: read it again by its name in /proc.
    std::fs::copy(format!("/proc/self/fd/{}", log.as_raw_fd()), rotated)?;
    log.set_len(0)?;
    log.seek(SeekFrom::Start(0))?;
    Ok(())
}

/// This process's standard error, apart from the lock that the standard library keeps on its own.
///
/// # Errors
/// The system's.
pub fn standard_error() -> io::Result<OwnedFd> {
    io::stderr().as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use slog::info;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn config() -> AgentConfig {
        let config = serde_json::json!({
            "instance": "web", "generation": 7, "role": "child", "cpus": [], "memory_bytes": 0, "ports": [],
            "key": "00".repeat(32), "start": { "kind": "fresh" },
            "listen": { "kind": "unix", "path": "/nonexistent/vsock.sock", "port": 9000 },
        });
        serde_json::from_value(config).unwrap()
    }

    fn patient(started: io::Result<(Log, Written)>) -> (Log, Written) {
        let (log, mut written) = started.unwrap();
        written.patience = PATIENCE;
        (log, written)
    }

    /// A pipe that nobody reads yet: full, it stands still.
    fn still() -> (io::PipeReader, OwnedFd) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, writer.into())
    }

    fn read_all(mut from: io::PipeReader) -> String {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn whoever_logs_waits_for_no_disk_and_what_is_dropped_is_counted() {
        let (reader, writer) = still();
        let (log, written) = patient(start(writer, None));
        let logger = logger(&config(), log);
        // More than may wait, and more than a pipe takes: a thread that waited would never come to the end.
        for n in 0..4 * LINES_MAX {
            info!(logger, "line"; "n" => n);
        }
        let read = thread::spawn(|| read_all(reader));
        drop(written);
        info!(logger, "one more");
        drop(logger);
        let text = read.join().unwrap();
        let (told, lines): (Vec<_>, Vec<_>) = text
            .lines()
            .partition(|line| line.ends_with("writing the log blocked"));
        assert!(lines[0].contains("n: 0,"), "{}", lines[0]);
        let last = lines[lines.len() - 1];
        assert!(last.contains("one more"), "{last}");
        let dropped = told
            .iter()
            .map(|line| line.split_once(' ').unwrap().0.parse::<usize>());
        let dropped: usize = dropped.map(Result::unwrap).sum();
        assert!(dropped > LINES_MAX);
        assert_eq!(dropped + lines.len(), 4 * LINES_MAX + 1);
    }

    #[tokio::test]
    async fn what_a_workload_prints_waits_for_the_disk_and_is_whole() {
        let (reader, writer) = still();
        let (log, written) = patient(start(writer, None));
        let (printed, mut print) = io::pipe().unwrap();
        let bytes = vec![b'x'; 8 * PIECES_MAX * PIECE_BYTES];
        let printing = thread::spawn({
            let bytes = bytes.clone();
            move || print.write_all(&bytes)
        });
        let relay = tokio::spawn(log.relay(printed.into()));
        // The runtime's only thread goes on meanwhile.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!relay.is_finished());
        let read = thread::spawn(|| read_all(reader));
        tokio::time::timeout(PATIENCE, relay)
            .await
            .unwrap()
            .unwrap();
        printing.join().unwrap().unwrap();
        drop(written);
        assert_eq!(read.join().unwrap().into_bytes(), bytes);
    }

    #[test]
    fn a_file_that_has_grown_is_begun_anew_and_kept_once() {
        let dir = tempfile::tempdir().unwrap();
        let [path, rotated] = ["agent.log", "agent.log.1"].map(|name| dir.path().join(name));
        let file = File::create(&path).unwrap();
        let (log, written) = patient(start(file.into(), Some(rotated.clone())));
        for fill in [b'a', b'b'] {
            let half = vec![fill; usize::try_from(LOG_MAX_BYTES / 2).unwrap()];
            log.clone().write_all(&half).unwrap();
        }
        log.clone().write_all(b"after").unwrap();
        drop(written);
        assert_eq!(std::fs::read(path).unwrap(), b"after");
        assert_eq!(std::fs::metadata(rotated).unwrap().len(), LOG_MAX_BYTES);
    }
}
