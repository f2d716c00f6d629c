//! The event stream: what happened, numbered, kept for those who come back.
//!
//! Readers pull: each holds the id it wants next and waits for the log to grow, so a slow reader
//! costs nothing and can never hold up a writer. One that fell behind what is kept is told so with
//! a [`EventKind::Gap`]. Ids only grow, also across restarts: at most
//! [`EVENTS_UNDER_WAY_MAX`] events can be on their way to the disk when the daemon dies, so a new daemon
//! begins that far beyond the last id it reads back.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actix::prelude::*;
use kmorph_control_api::{Event, EventKind};
use serde_json::json;
use tokio::sync::watch;

use crate::journal::{Change, JOURNAL_MAILBOX, Journal, NOTES_MAX, Note};
use crate::wall_clock;

/// Events kept in memory for streams.
pub const EVENTS_IN_MEMORY: usize = 4096;
/// Events that may be on their way to the disk.
pub const EVENTS_UNDER_WAY_MAX: usize = JOURNAL_MAILBOX + NOTES_MAX;

/// The log. Cheap to clone; shared by all threads.
#[derive(Clone)]
pub struct EventLog {
    inner: Arc<Inner>,
}

struct Inner {
    kept: Mutex<Kept>,
    newest: watch::Sender<u64>,
    journal: Addr<Journal>,
}

struct Kept {
    events: VecDeque<Encoded>,
    next_id: u64,
    not_stored: u64,
}

/// An event as it is kept: encoded once, and shared by the journal and every stream. As text it takes a fraction of
/// the memory that its details take as values.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Its id.
    pub id: u64,
    /// What.
    pub kind: EventKind,
    /// The instance concerned.
    pub instance: Option<Box<str>>,
    /// All of it, as JSON.
    pub json: Arc<str>,
}

impl Encoded {
    fn new(event: &Event) -> Result<Self, serde_json::Error> {
        Ok(Self {
            id: event.id,
            kind: event.kind,
            instance: event.instance.as_deref().map(Into::into),
            json: serde_json::to_string(event)?.into(),
        })
    }

    fn decode(&self) -> Result<Event, serde_json::Error> {
        serde_json::from_str(&self.json)
    }
}

/// An event before it has its id and time.
#[derive(Clone, Debug)]
pub struct Draft {
    /// What.
    pub kind: EventKind,
    /// The instance concerned.
    pub instance: Option<String>,
    /// Its generation.
    pub generation: Option<u64>,
    /// One line for people.
    pub message: String,
    /// More, for programs.
    pub detail: serde_json::Value,
}

impl Draft {
    /// An event of the daemon itself.
    pub fn daemon(message: impl Into<String>) -> Self {
        let (instance, generation) = (None, None);
        let message = message.into();
        Self {
            kind: EventKind::Daemon,
            instance,
            generation,
            message,
            detail: json!({}),
        }
    }

    /// An event of one instance.
    pub fn of(
        kind: EventKind,
        instance: &str,
        generation: u64,
        message: impl Into<String>,
    ) -> Self {
        let (instance, generation) = (Some(instance.to_owned()), Some(generation));
        Self {
            kind,
            instance,
            generation,
            message: message.into(),
            detail: json!({}),
        }
    }

    /// The same with details.
    #[must_use]
    pub fn with(mut self, detail: serde_json::Value) -> Self {
        self.detail = detail;
        self
    }
}

impl EventLog {
    /// A log that goes on after `stored`, the events read back from the journal.
    pub fn new(stored: Vec<Event>, journal: Addr<Journal>) -> Self {
        let last = stored.last().map_or(0, |e| e.id);
        let next_id = if last == 0 {
            1
        } else {
            last + EVENTS_UNDER_WAY_MAX as u64
        };
        let kept = Kept {
            events: stored.iter().flat_map(Encoded::new).collect(),
            next_id,
            not_stored: 0,
        };
        let (newest, _) = watch::channel(last);
        Self {
            inner: Arc::new(Inner {
                kept: Mutex::new(kept),
                newest,
                journal,
            }),
        }
    }

    /// Adds an event, tells the readers, and hands it to the journal without waiting: an event is a
    /// report, not a decision, and may be lost with the daemon.
    pub fn publish(&self, draft: Draft) {
        let (id, json) = {
            let mut kept = self.kept();
            let event = Event {
                id: kept.next_id,
                at: wall_clock::now_rfc3339(),
                kind: draft.kind,
                instance: draft.instance,
                generation: draft.generation,
                message: draft.message,
                detail: draft.detail,
            };
            kept.next_id += 1;
            let Ok(encoded) = Encoded::new(&event) else {
                kept.not_stored += 1;
                return;
            };
            if kept.events.len() == EVENTS_IN_MEMORY {
                kept.events.pop_front();
            }
            let json = Arc::clone(&encoded.json);
            kept.events.push_back(encoded);
            (event.id, json)
        };
        self.inner.newest.send_replace(id);
        let note = Note(Change::Event(id, json));
        if self.inner.journal.try_send(note).is_err() {
            self.kept().not_stored += 1;
        }
    }

    /// Events that did not reach the journal because it was behind or gone.
    pub fn not_stored(&self) -> u64 {
        self.kept().not_stored
    }

    /// Id of the newest event, and a receiver that wakes when there is a newer one.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.newest.subscribe()
    }

    /// Up to `limit` events after the one with id `after`, oldest first. Begins with a
    /// [`EventKind::Gap`] when some of them are not kept any more.
    pub fn after(&self, after: u64, limit: usize) -> Vec<Encoded> {
        let kept = self.kept();
        let start = kept.events.partition_point(|e| e.id <= after);
        let mut found: Vec<_> = kept.events.range(start..).take(limit).cloned().collect();
        let full = kept.events.len() == EVENTS_IN_MEMORY;
        if start == 0
            && full
            && after > 0
            && let Some(oldest) = found.first()
            && oldest.id - 1 > after
            && let Ok(gap) = gap(after, oldest)
        {
            found.insert(0, gap);
        }
        found
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.inner
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a reader is told that missed the events from `after` to `oldest`.
fn gap(after: u64, oldest: &Encoded) -> Result<Encoded, serde_json::Error> {
    let (first, last) = (after + 1, oldest.id - 1);
    Encoded::new(&Event {
        id: last,
        at: oldest.decode()?.at,
        kind: EventKind::Gap,
        instance: None,
        generation: None,
        message: format!("events {first} to {last} are not kept any more"),
        detail: json!({ "oldest": oldest.id }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix::test]
    async fn a_reader_that_fell_behind_is_told_and_ids_grow_across_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let log = EventLog::new(Vec::new(), journal.clone());
        for n in 0..=EVENTS_IN_MEMORY {
            log.publish(Draft::daemon(n.to_string()));
        }
        let read = log.after(0, 3);
        assert_eq!(
            read[0].decode().unwrap().message,
            "1",
            "from the beginning means from what there is"
        );
        let read = log.after(1, 3);
        assert_eq!(read[0].id, 2, "nothing was missed");
        log.publish(Draft::daemon("one more"));
        let read = log.after(1, 3);
        assert_eq!((read[0].kind, read[0].id), (EventKind::Gap, 2));
        assert_eq!(read[1].id, 3);
        let newest = *log.watch().borrow();
        let stored = log.after(newest - 1, 1)[0].decode().unwrap();
        let again = EventLog::new(vec![stored], journal);
        again.publish(Draft::daemon("after a restart"));
        assert!(*again.watch().borrow() > newest);
        arbiter.stop();
        arbiter.join().unwrap();
    }
}
