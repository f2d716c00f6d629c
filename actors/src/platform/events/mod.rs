//! The event stream: numbered events, kept for clients that reconnect.
//!
//! Readers pull: each reader stores the id that it wants next and waits for the log to grow, so a slow reader costs
//! nothing and cannot delay a writer. Memory holds the newest events, the journal all stored ones
//! ([`EVENTS_KEPT`](crate::platform::journal::EVENTS_KEPT)). A reader that has fallen behind the stored events receives
//! a [`EventKind::Gap`].
//!
//! Ids only grow, also across restarts. When a daemon is killed, the events on their way to the disk are lost, but
//! readers may have seen them. The newest id is therefore stored in a file that outlives the daemon, and the next
//! daemon continues after it. Only a crash of the host loses that file; then the ids jump by [`EVENTS_UNDER_WAY_MAX`],
//! the maximum number of events on their way.

mod mark;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::model::{Event, EventKind};
use actix::prelude::*;
use serde_json::json;
use tokio::sync::watch;

use mark::Mark;

use crate::platform::journal::{Change, EventsAfter, JOURNAL_MAILBOX, Journal, NOTES_MAX, Note};
use crate::platform::wall_clock;

/// Number of events kept in memory for streams.
pub const EVENTS_IN_MEMORY: usize = 4096;
/// Maximum number of events on their way to the disk.
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
    mark: Option<Mark>,
}

/// A stored event: encoded once, and shared by the journal and all streams. Its details as text take a fraction of
/// the memory that they take as values.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Its id.
    pub id: u64,
    /// Its kind.
    pub kind: EventKind,
    /// The instance, if any.
    pub instance: Option<Box<str>>,
    /// The whole event, as JSON.
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

    /// Decodes the event.
    ///
    /// # Errors
    /// When another version of kmorphd wrote an event that this version cannot decode.
    pub fn decode(&self) -> Result<Event, serde_json::Error> {
        serde_json::from_str(&self.json)
    }
}

/// An event without its id and time.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Its kind.
    pub kind: EventKind,
    /// The instance, if any.
    pub instance: Option<String>,
    /// Its generation.
    pub generation: Option<u64>,
    /// One line for people.
    pub message: String,
    /// Details for programs.
    pub detail: serde_json::Value,
}

impl Draft {
    /// Returns an event of the daemon itself.
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

    /// Returns an event of one instance.
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

    /// Returns this event with details.
    #[must_use]
    pub fn with(mut self, detail: serde_json::Value) -> Self {
        self.detail = detail;
        self
    }
}

impl EventLog {
    /// Creates a log that continues after `stored`, the newest events in the journal. It stores its newest id in
    /// the file `mark`, together with the host's boot id `boot_id`.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn new(
        stored: Vec<Event>,
        journal: Addr<Journal>,
        mark: &Path,
        boot_id: &str,
    ) -> std::io::Result<Self> {
        let last = stored.last().map_or(0, |e| e.id);
        let (mark, noted) = Mark::open(mark, boot_id)?;
        let next_id = match noted {
            Some(noted) => noted.max(last) + 1,
            None if last == 0 => 1,
            None => last + EVENTS_UNDER_WAY_MAX as u64,
        };
        let kept = Kept {
            events: stored.iter().flat_map(Encoded::new).collect(),
            next_id,
            not_stored: 0,
            mark: Some(mark),
        };
        let (newest, _) = watch::channel(next_id - 1);
        Ok(Self {
            inner: Arc::new(Inner {
                kept: Mutex::new(kept),
                newest,
                journal,
            }),
        })
    }

    /// Adds an event, notifies the readers, and passes the event to the journal without waiting: an
    /// event is a report, not a decision, and may be lost with the daemon.
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
            // If this write fails, the next daemon's ids jump; nothing else is lost.
            let noted = kept.mark.as_ref().map(|mark| mark.note(event.id));
            if matches!(noted, Some(Err(_))) {
                kept.mark = None;
            }
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

    /// Returns the number of events that did not reach the journal because it was slow or had ended.
    pub fn not_stored(&self) -> u64 {
        self.kept().not_stored
    }

    /// Returns the id of the newest event, and a receiver that wakes for a newer one.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.newest.subscribe()
    }

    /// Returns up to `limit` events after the event with id `after`, oldest first; none if no event is newer. The list
    /// begins with a [`EventKind::Gap`] if some events are no longer stored or cannot be read.
    pub async fn after(&self, after: u64, limit: usize) -> Vec<Encoded> {
        let (found, reaches_back) = self.in_memory(after, limit);
        if reaches_back {
            return found;
        }
        let asked = self.inner.journal.send(EventsAfter { after, limit });
        match tokio::time::timeout(JOURNAL_TIMEOUT, asked).await {
            // No events are missing in between.
            Ok(Ok(Ok(stored))) if stored.events.is_empty() => found,
            Ok(Ok(Ok(stored))) => {
                let events = stored.events.iter().flat_map(Encoded::new).collect();
                with_gap(after, stored.dropped, events)
            }
            // The journal cannot be read now, or waits for its disk.
            _ => with_gap(after, true, found),
        }
    }

    /// Returns the events in memory after `after`, and whether they are complete.
    fn in_memory(&self, after: u64, limit: usize) -> (Vec<Encoded>, bool) {
        let kept = self.kept();
        let start = kept.events.partition_point(|e| e.id <= after);
        let found = kept
            .events
            .iter()
            .skip(start)
            .take(limit)
            .cloned()
            .collect();
        let oldest = kept.events.front().map_or(kept.next_id, |e| e.id);
        (found, after.saturating_add(1) >= oldest)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.inner
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Maximum wait for the journal to read events.
const JOURNAL_TIMEOUT: Duration = Duration::from_secs(5);

/// If events after `after` are missing, inserts a gap before `found`.
fn with_gap(after: u64, missing: bool, mut found: Vec<Encoded>) -> Vec<Encoded> {
    let Some(oldest) = found
        .first()
        .filter(|e| missing && after > 0 && e.id - 1 > after)
    else {
        return found;
    };
    let (last, at) = (oldest.id - 1, oldest.decode().map(|event| event.at));
    let gap = Encoded::new(&Event {
        id: last,
        at: at.unwrap_or_default(),
        kind: EventKind::Gap,
        instance: None,
        generation: None,
        message: format!("events {} to {last} are not kept any more", after + 1),
        detail: json!({ "oldest": oldest.id }),
    });
    if let Ok(gap) = gap {
        found.insert(0, gap);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::journal::{EVENTS_KEPT, record};

    fn event(id: u64) -> Change {
        let event = Event {
            id,
            at: String::new(),
            kind: EventKind::Daemon,
            instance: None,
            generation: None,
            message: id.to_string(),
            detail: json!({}),
        };
        Change::Event(id, Encoded::new(&event).unwrap().json)
    }

    fn ids(events: &[Encoded]) -> Vec<u64> {
        events.iter().map(|e| e.id).collect()
    }

    #[actix::test]
    async fn what_memory_does_not_have_any_more_comes_from_the_journal() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("event-id");
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let log = EventLog::new(Vec::new(), journal.clone(), &mark, "boot").unwrap();
        for n in 1..=EVENTS_IN_MEMORY + 10 {
            log.publish(Draft::daemon(n.to_string()));
            if n % 100 == 0 {
                record(&journal, Vec::new()).await.unwrap();
            }
        }
        assert_eq!(
            ids(&log.after(0, 3).await),
            [1, 2, 3],
            "from the first that is kept"
        );
        assert_eq!(
            ids(&log.after(7, 3).await),
            [8, 9, 10],
            "nothing was missed"
        );
        let newest = *log.watch().borrow();
        assert_eq!(ids(&log.after(newest - 1, 3).await), [newest]);
        assert!(log.after(newest, 3).await.is_empty());
        assert!(log.after(u64::MAX, 3).await.is_empty());
        arbiter.stop();
        arbiter.join().unwrap();
        let read = log.after(1, 3).await;
        assert_eq!(
            read[0].kind,
            EventKind::Gap,
            "without its journal it says what is missing"
        );
    }

    #[actix::test]
    async fn as_many_events_are_kept_as_promised_also_when_ids_have_jumped() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("event-id");
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let before = 1..=EVENTS_KEPT / 2;
        let later = 1_000_000..1_000_000 + EVENTS_KEPT / 2 + 3;
        let all: Vec<u64> = before.chain(later).collect();
        for some in all.chunks(1000) {
            record(&journal, some.iter().copied().map(event).collect())
                .await
                .unwrap();
        }
        let snapshot = journal
            .send(crate::platform::journal::Load)
            .await
            .unwrap()
            .unwrap();
        let log = EventLog::new(snapshot.events, journal.clone(), &mark, "boot").unwrap();
        let mut read = log.after(0, usize::MAX).await;
        read.truncate(all.len());
        assert_eq!(ids(&read), all[3..], "the oldest three gave way");
        let behind = log.after(1, 2).await;
        assert_eq!(
            (behind[0].kind, behind[0].id, behind[1].id),
            (EventKind::Gap, 3, 4)
        );
        let over_the_jump = log.after(EVENTS_KEPT / 2, 1).await;
        assert_eq!(
            ids(&over_the_jump),
            [1_000_000],
            "no event was between them, so none is missing"
        );
        arbiter.stop();
        arbiter.join().unwrap();
    }

    #[actix::test]
    async fn ids_go_on_where_a_killed_daemon_left_them() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("event-id");
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let log = EventLog::new(Vec::new(), journal.clone(), &mark, "boot").unwrap();
        for n in 0..5 {
            log.publish(Draft::daemon(n.to_string()));
        }
        // The journal had stored two of five events when the daemon was killed.
        let stored = log.after(0, 2).await;
        let stored: Vec<_> = stored.iter().map(|event| event.decode().unwrap()).collect();
        let next = EventLog::new(stored.clone(), journal.clone(), &mark, "boot").unwrap();
        next.publish(Draft::daemon("after a restart"));
        assert_eq!(*next.watch().borrow(), 6);
        assert_eq!(ids(&next.after(5, 9).await), [6]);
        let rebooted = EventLog::new(stored, journal, &mark, "another boot").unwrap();
        rebooted.publish(Draft::daemon("after a crash of the host"));
        assert_eq!(*rebooted.watch().borrow(), 2 + EVENTS_UNDER_WAY_MAX as u64);
        arbiter.stop();
        arbiter.join().unwrap();
    }
}
