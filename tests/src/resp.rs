//! A client of the key-value server that records the time of every answer.

use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::DEADLINE;

/// A connection to the server.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects to the local `port`.
    ///
    /// # Errors
    /// Errors of the system.
    pub fn connect(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Sends one command and returns its answer: a simple string, an integer or a bulk string.
    ///
    /// # Errors
    /// If the connection breaks or the server answers with an error.
    pub fn call(&mut self, words: &[&str]) -> io::Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.stream.get_mut().write_all(request.as_bytes())?;
        let line = self.line()?;
        let (kind, rest) = line.split_at_checked(1).ok_or(io::ErrorKind::InvalidData)?;
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "$" if rest == "-1" => Ok(String::new()),
            "$" => self.line(),
            _ => Err(io::Error::other(line)),
        }
    }

    /// Sets `count` keys to values of `value_bytes`, in pipelined batches.
    ///
    /// # Errors
    /// If the connection breaks or the server answers with an error.
    pub fn fill(&mut self, count: usize, value_bytes: usize) -> io::Result<()> {
        const AT_ONCE: usize = 32;
        let value = "v".repeat(value_bytes);
        let keys: Vec<usize> = (0..count).collect();
        for batch in keys.chunks(AT_ONCE) {
            let mut request = String::with_capacity(batch.len() * (value_bytes + 64));
            for key in batch {
                let head = format!("*3\r\n$3\r\nSET\r\n$12\r\nkey:{key:08}\r\n");
                request.push_str(&format!("{head}${value_bytes}\r\n{value}\r\n"));
            }
            self.stream.get_mut().write_all(request.as_bytes())?;
            for _ in batch {
                let answer = self.line()?;
                if answer != "+OK" {
                    return Err(io::Error::other(answer));
                }
            }
        }
        Ok(())
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

/// Observations of a client.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Number of answered requests.
    pub answered: u64,
    /// Number of failed requests.
    pub failed: u64,
    /// The first failure.
    pub first_failure: Option<String>,
    /// Maximum time between two answers.
    pub longest_gap: Duration,
    /// Number of answers that do not match the request.
    pub wrong: u64,
    /// Times of the answers, in order: 16 bytes each.
    pub answers: Vec<Instant>,
}

impl Seen {
    /// Returns the maximum time between two answers that overlaps the time from `from` to `to`; zero if there is no
    /// overlap.
    pub fn longest_gap_between(&self, from: Instant, to: Instant) -> Duration {
        let pairs = self.answers.windows(2).map(|pair| (pair[0], pair[1]));
        pairs
            .filter(|(last, next)| *next >= from && *last <= to)
            .map(|(last, next)| next - last)
            .max()
            .unwrap_or_default()
    }
}

/// A client with a steady pace on a thread of its own: increments a counter and checks each answer.
pub struct Steady {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Seen>,
}

impl Steady {
    /// Starts a client that sends one request per `pace` on one connection to `port`.
    pub fn start(port: u16, pace: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || run(port, pace, &told));
        Self { stop, thread }
    }

    /// Ends the client and returns its observations.
    pub fn stop(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client does not panic")
    }
}

fn run(port: u16, pace: Duration, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut client = Client::connect(port).expect("the server accepts");
    let key = format!("steady-{:?}", std::thread::current().id());
    let mut expected = 0_u64;
    let mut last = Instant::now();
    let mut due = last;
    while !stop.load(Ordering::Relaxed) {
        match client.call(&["INCR", &key]) {
            Ok(answer) => {
                expected += 1;
                seen.answered += 1;
                seen.answers.push(Instant::now());
                seen.wrong += u64::from(answer != expected.to_string());
            }
            Err(error) => {
                seen.failed += 1;
                seen.first_failure.get_or_insert(error.to_string());
                match Client::connect(port) {
                    Ok(again) => client = again,
                    Err(_) => return seen,
                }
            }
        }
        let now = Instant::now();
        seen.longest_gap = seen.longest_gap.max(now - last);
        last = now;
        due = (due + pace).max(now);
        std::thread::sleep(due - now);
    }
    seen
}
