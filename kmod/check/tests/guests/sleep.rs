//! Guests that suspend to memory: QEMU says when one sleeps, and is asked to wake it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// How often a guest has slept and was woken.
#[derive(Clone, Default)]
pub(crate) struct Sleeps(Arc<AtomicU32>);

impl Sleeps {
    pub(crate) fn count(&self) -> u32 {
        self.0.load(Relaxed)
    }

    /// Wakes the guest whose QEMU connects its QMP monitor to `path`, whenever the guest sleeps.
    pub(crate) fn of(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let sleeps = Self::default();
        let watched = sleeps.clone();
        std::thread::spawn(move || watched.wake(listener.accept()?.0));
        sleeps
    }

    fn wake(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?);
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
        let mut line = String::new();
        while lines.read_line(&mut line)? > 0 {
            // Sent once the machine is in the state in which QEMU accepts the command.
            if line.contains("\"event\": \"SUSPEND\"") {
                self.0.fetch_add(1, Relaxed);
                stream.write_all(b"{\"execute\":\"system_wakeup\"}\n")?;
            }
            if line.contains("\"error\"") {
                eprintln!("QMP: {}", line.trim_end());
            }
            line.clear();
        }
        Ok(())
    }
}
