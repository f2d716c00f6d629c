//! A follower of the event stream that records when each event arrived.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use kmorph_control_api::Event;

use crate::{Control, DEADLINE};

/// An event and the time of its arrival: slightly later than the event, never earlier.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// The time of arrival.
    pub at: Instant,
    /// The event.
    pub event: Event,
}

/// Follower of the events, from its creation or from an earlier event.
#[derive(Debug)]
pub struct Events {
    arrived: Receiver<Arrived>,
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Events {
    /// Follows the events of the daemon behind `control`. No event after the return is missed.
    pub fn follow(control: &Control) -> Self {
        Self::begin(control, "")
    }

    /// Like [`Events::follow`], starting with the event after `last`.
    pub fn resume(control: &Control, last: u64) -> Self {
        Self::begin(control, &format!("Last-Event-ID: {last}\r\n"))
    }

    fn begin(control: &Control, header: &str) -> Self {
        let mut stream = UnixStream::connect(control.socket()).expect("the daemon answers");
        let request = format!("GET /v1/events HTTP/1.0\r\nHost: kmorph\r\n{header}\r\n");
        stream
            .write_all(request.as_bytes())
            .expect("the daemon reads");
        let reader = stream.try_clone().expect("a descriptor is left");
        let mut lines = BufReader::new(reader).lines();
        let status = lines.next().expect("an answer").expect("a readable answer");
        assert!(status.contains(" 200 "), "no event stream: {status}");
        let (sender, arrived) = channel();
        let thread = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Some(json) = line.strip_prefix("data: ") else {
                    continue;
                };
                let at = Instant::now();
                let event = serde_json::from_str(json).expect("an event");
                if sender.send(Arrived { at, event }).is_err() {
                    return;
                }
            }
        });
        Self {
            arrived,
            stream,
            thread: Some(thread),
        }
    }

    /// Takes events until the first `wanted` one. Panics after [`DEADLINE`].
    pub fn wait(&self, what: &str, mut wanted: impl FnMut(&Event) -> bool) -> Arrived {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.arrived.recv_timeout(left) {
                Ok(arrived) if wanted(&arrived.event) => return arrived,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("waited in vain for {what}"),
                Err(RecvTimeoutError::Disconnected) => panic!("the events ended before {what}"),
            }
        }
    }

    /// Takes all events that have arrived.
    pub fn drain(&self) -> Vec<Arrived> {
        self.arrived.try_iter().collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // Fails if the daemon has closed the stream already; the thread ends in both cases.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
