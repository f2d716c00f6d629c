//! An instance's vsock: a Unix socket that takes `CONNECT <port>` and answers `OK <port>`. Like a kernel, it refuses
//! a port without a listener, by hanging up. A stopped kernel is silent: its connections stay open until it boots
//! again or is unloaded.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Size of a block that is forwarded, bytes.
const BLOCK_BYTES: usize = 64 << 10;
/// Maximum length of a line of the exchange, bytes.
const LINE_MAX_BYTES: usize = 32;

/// The vsock connections to one boot of an instance.
pub(crate) struct Line {
    path: PathBuf,
    /// Path of each port's listener.
    ways: HashMap<u64, PathBuf>,
    cut: AtomicBool,
    closed: AtomicBool,
    /// The host's ends of connections, by number.
    held: Mutex<HashMap<u64, UnixStream>>,
    next: AtomicU64,
}

impl Line {
    pub(crate) fn open(path: &Path, ways: HashMap<u64, PathBuf>) -> io::Result<Arc<Self>> {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        let line = Arc::new(Self {
            path: path.to_owned(),
            ways,
            cut: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            held: Mutex::default(),
            next: AtomicU64::new(0),
        });
        let accepts = Arc::clone(&line);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepts.closed.load(Ordering::SeqCst) {
                    return;
                }
                let line = Arc::clone(&accepts);
                std::thread::spawn(move || line.serve(stream));
            }
        });
        Ok(line)
    }

    /// Stops all forwarding.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// Closes the socket and all connections.
    pub(crate) fn close(&self) {
        self.cut();
        self.closed.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
        for (_, stream) in self.held.lock().unwrap().drain() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn serve(&self, host: UnixStream) {
        let Ok(kept) = host.try_clone() else { return };
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        self.held.lock().unwrap().insert(number, kept);
        self.carry(host);
        if !self.is_cut() {
            self.held.lock().unwrap().remove(&number);
        }
    }

    fn carry(&self, mut host: UnixStream) {
        let Some(port) = read_line(&mut host) else {
            return self.hang_up(&host);
        };
        if self.is_cut() {
            return;
        }
        let guest = self.ways.get(&port).and_then(|way| reach(way, port).ok());
        let (Some(guest), Ok(())) = (guest, writeln!(host, "OK {port}")) else {
            return self.hang_up(&host);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| self.pass(&guest, &host));
            self.pass(&host, &guest);
        });
    }

    /// Forwards one direction. The end of one direction ends the whole connection.
    fn pass(&self, mut from: &UnixStream, mut to: &UnixStream) {
        let mut block = vec![0; BLOCK_BYTES];
        loop {
            match from.read(&mut block) {
                Ok(length @ 1..) if !self.is_cut() => {
                    if to.write_all(&block[..length]).is_err() {
                        break;
                    }
                }
                Ok(1..) => return,
                Ok(0) | Err(_) => break,
            }
        }
        for end in [from, to] {
            self.hang_up(end);
        }
    }

    fn hang_up(&self, stream: &UnixStream) {
        if !self.is_cut() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Reads the requested port.
fn read_line(stream: &mut UnixStream) -> Option<u64> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while line.len() < LINE_MAX_BYTES {
        stream.read_exact(&mut byte).ok()?;
        if byte == *b"\n" {
            let text = std::str::from_utf8(&line).ok()?;
            return text.strip_prefix("CONNECT ")?.parse().ok();
        }
        line.push(byte[0]);
    }
    None
}

/// Connects to a listener in the instance; the agent's listener takes the same line.
fn reach(way: &Path, port: u64) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(way)?;
    if way.ends_with("agent.sock") {
        writeln!(stream, "CONNECT {port}")?;
        let mut answer = vec![0; format!("OK {port}\n").len()];
        stream.read_exact(&mut answer)?;
    }
    Ok(stream)
}
