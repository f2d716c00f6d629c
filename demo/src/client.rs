//! The client: increments a counter at a steady pace over one connection, checks every answer, and reconnects when the
//! connection breaks.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kmorph_tests::resp::Client;

/// The counter's key.
const KEY: &str = "demo:counter";

/// Observations of the client since the last [`Steady::take`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Number of answered requests.
    pub(crate) answered: u64,
    /// Number of failed requests, including refused connections.
    pub(crate) failed: u64,
    /// Reason of the first failure.
    pub(crate) first_failure: Option<String>,
    /// Number of restarts of the counter: the server had lost its memory.
    pub(crate) began_anew: u64,
    /// Answers that prove a lost or repeated request.
    pub(crate) wrong: Vec<String>,
    /// Maximum time between two answers.
    pub(crate) longest_gap: Duration,
}

#[derive(Default)]
struct Shared {
    seen: Seen,
    stop: bool,
}

/// The client, on a thread of its own; on drop, it ends after the request in progress.
pub(crate) struct Steady {
    shared: Arc<Mutex<Shared>>,
}

impl Steady {
    /// Starts a client that sends one request per `pace` to the local `port`.
    pub(crate) fn start(port: u16, pace: Duration) -> io::Result<Self> {
        let client = Client::connect(port)?;
        let shared = Arc::new(Mutex::new(Shared::default()));
        let told = shared.clone();
        std::thread::spawn(move || run(client, port, pace, &told));
        Ok(Self { shared })
    }

    /// Returns the observations since the last call.
    pub(crate) fn take(&self) -> Seen {
        std::mem::take(&mut lock(&self.shared).seen)
    }

    /// Returns the number of requests answered since the last [`Steady::take`].
    pub(crate) fn answered(&self) -> u64 {
        lock(&self.shared).seen.answered
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        lock(&self.shared).stop = true;
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(client: Client, port: u16, pace: Duration, shared: &Mutex<Shared>) {
    let mut connection = Some(client);
    let mut counter = Counter::default();
    let mut last = Instant::now();
    let mut due = last;
    loop {
        let asked = match connection.take() {
            Some(client) => Ok(client),
            None => Client::connect(port),
        };
        let answer = asked.and_then(|mut client| {
            let answer = client.call(&["INCR", KEY])?;
            Ok((client, answer))
        });
        let now = Instant::now();
        let mut shared = lock(shared);
        if shared.stop {
            return;
        }
        let seen = &mut shared.seen;
        match answer {
            Ok((client, answer)) => {
                connection = Some(client);
                seen.answered += 1;
                seen.longest_gap = seen.longest_gap.max(now - last);
                last = now;
                match counter.judge(&answer) {
                    Judgement::Right => {}
                    Judgement::BeganAnew => seen.began_anew += 1,
                    Judgement::Wrong(text) => seen.wrong.push(text),
                }
            }
            Err(error) => {
                seen.failed += 1;
                seen.first_failure.get_or_insert(error.to_string());
                counter.unanswered();
            }
        }
        drop(shared);
        due = (due + pace).max(now);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// The expected value of the counter.
#[derive(Default)]
struct Counter {
    /// The last answer.
    value: u64,
    /// Number of requests since then without an answer, which the server may have executed.
    in_doubt: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    Right,
    BeganAnew,
    Wrong(String),
}

impl Counter {
    fn unanswered(&mut self) {
        self.in_doubt += 1;
    }

    fn judge(&mut self, answer: &str) -> Judgement {
        let (low, high) = (self.value + 1, self.value + 1 + self.in_doubt);
        let broke = self.in_doubt > 0;
        let Ok(value) = answer.parse() else {
            return Judgement::Wrong(format!("{answer:?} instead of {low}"));
        };
        self.value = value;
        self.in_doubt = 0;
        match value {
            value if (low..=high).contains(&value) => Judgement::Right,
            // Only a new connection may lead to a server that has lost its memory.
            1 if broke => Judgement::BeganAnew,
            value => Judgement::Wrong(format!("{value} instead of {low}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_is_one_more_than_the_last() {
        let mut counter = Counter::default();
        assert_eq!(counter.judge("1"), Judgement::Right);
        assert_eq!(counter.judge("2"), Judgement::Right);
        assert!(matches!(counter.judge("2"), Judgement::Wrong(_)));
        assert_eq!(counter.judge("3"), Judgement::Right);
        assert!(matches!(counter.judge("OK"), Judgement::Wrong(_)));
        assert!(matches!(counter.judge("1"), Judgement::Wrong(_)));
    }

    #[test]
    fn a_request_without_an_answer_may_have_been_done_or_not() {
        for (answer, right) in [("2", true), ("3", true), ("4", false)] {
            let mut counter = Counter::default();
            counter.judge("1");
            counter.unanswered();
            assert_eq!(counter.judge(answer) == Judgement::Right, right, "{answer}");
        }
    }

    #[test]
    fn a_server_that_lost_its_memory_is_noticed() {
        let mut counter = Counter::default();
        counter.judge("1");
        counter.judge("2");
        counter.unanswered();
        assert_eq!(counter.judge("1"), Judgement::BeganAnew);
        assert_eq!(counter.judge("2"), Judgement::Right);
    }
}
