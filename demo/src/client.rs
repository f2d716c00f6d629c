//! The client: increments a counter at a steady pace over one connection, checks every answer, and
//! connects again when the connection breaks.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kmorph_tests::resp::Client;

/// The counter's key.
const KEY: &str = "demo:counter";

/// What the client saw since it was last asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Requests that were answered.
    pub(crate) answered: u64,
    /// Requests that were not, and connections that were refused.
    pub(crate) failed: u64,
    /// The reason of the first of them.
    pub(crate) first_failure: Option<String>,
    /// How often the counter began anew: the server had lost its memory.
    pub(crate) began_anew: u64,
    /// Answers that no server can give that lost nothing and did nothing twice.
    pub(crate) wrong: Vec<String>,
    /// Longest time between two answers.
    pub(crate) longest_gap: Duration,
}

#[derive(Default)]
struct Shared {
    seen: Seen,
    stop: bool,
}

/// The client, on a thread of its own; dropped, it ends after the request under way.
pub(crate) struct Steady {
    shared: Arc<Mutex<Shared>>,
}

impl Steady {
    /// One request each `pace` to the local `port`.
    pub(crate) fn start(port: u16, pace: Duration) -> io::Result<Self> {
        let client = Client::connect(port)?;
        let shared = Arc::new(Mutex::new(Shared::default()));
        let told = shared.clone();
        std::thread::spawn(move || run(client, port, pace, &told));
        Ok(Self { shared })
    }

    /// What it saw since the last time.
    pub(crate) fn take(&self) -> Seen {
        std::mem::take(&mut lock(&self.shared).seen)
    }

    /// Requests answered since the last [`Steady::take`].
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

/// What the counter must be.
#[derive(Default)]
struct Counter {
    /// The last answer.
    value: u64,
    /// Requests since then that may have been done although no answer came.
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
