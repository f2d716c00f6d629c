//! A client that writes increasing numbers, one after the other, and remembers the last acknowledged one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kmorph_tests::resp::Client;

/// Pause before the reconnect of a broken connection.
const RECONNECT: Duration = Duration::from_millis(2);

/// The key of the numbers.
pub(crate) const KEY: &str = "number";

/// A writer; see the module.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts writing to the local `port`, beginning with `first`.
    pub(crate) fn start(port: u16, first: u64) -> Self {
        let (stop, acknowledged) = (Arc::<AtomicBool>::default(), Arc::new(AtomicU64::new(0)));
        let (ending, done) = (stop.clone(), acknowledged.clone());
        let thread = std::thread::spawn(move || {
            let mut number = first;
            while !ending.load(Ordering::Relaxed) {
                let Ok(mut client) = Client::connect(port) else {
                    std::thread::sleep(RECONNECT);
                    continue;
                };
                while !ending.load(Ordering::Relaxed) {
                    match client.call(&["SET", KEY, &number.to_string()]) {
                        Ok(answer) => assert_eq!(answer, "OK"),
                        Err(_) => break,
                    }
                    done.store(number, Ordering::Relaxed);
                    number += 1;
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
        Self {
            stop,
            acknowledged,
            thread: Some(thread),
        }
    }

    /// Ends the writer; returns the last acknowledged number, or 0.
    pub(crate) fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the writer saw no wrong answer");
        }
        self.acknowledged.load(Ordering::Relaxed)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
