//! Operations: long work that clients can watch, list and cancel.
//!
//! The worker holds a [`Handle`]; all others see the [`Operation`] through [`Operations`]. A handle
//! that is dropped without a result fails its operation, so that the operation of a panicked actor
//! does not stay "running".

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::{
    Command, Failure, FailureKind, Operation, OperationKind, OperationResult, OperationState,
    Progress,
};
use actix::prelude::*;
use tokio::sync::watch;

use crate::platform::journal::{Change, Journal, OPERATIONS_KEPT, Record};
use crate::platform::wall_clock;

/// Maximum number of concurrent operations.
pub const OPERATIONS_RUNNING_MAX: usize = 4096;

/// All operations. Cheap to clone; shared by all threads.
#[derive(Clone)]
pub struct Operations {
    inner: Arc<Inner>,
}

struct Inner {
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
    journal: Addr<Journal>,
}

struct Table {
    by_id: BTreeMap<u64, Entry>,
    next_id: u64,
}

/// A stored operation. A finished one no longer changes and is rarely read: as text it takes a fraction of the
/// memory that its result takes as values.
enum Entry {
    UnderWay {
        operation: Box<Operation>,
        cancel: watch::Sender<bool>,
    },
    Over(Arc<str>),
}

impl Entry {
    fn is_over(&self) -> bool {
        matches!(self, Self::Over(_))
    }

    fn read(&self) -> Result<Operation, Failure> {
        match self {
            Self::UnderWay { operation, .. } => Ok(Operation::clone(operation)),
            Self::Over(json) => serde_json::from_str(json).map_err(unreadable),
        }
    }
}

fn encode(operation: &Operation) -> Result<Arc<str>, Failure> {
    let json = serde_json::to_string(operation).map_err(unreadable)?;
    Ok(json.into())
}

fn unreadable(error: serde_json::Error) -> Failure {
    Failure::new(
        FailureKind::Internal,
        format!("an operation as text: {error}"),
    )
}

/// The worker's end of an operation.
pub struct Handle {
    operations: Operations,
    id: u64,
    cancel: watch::Receiver<bool>,
    over: bool,
}

impl Operations {
    /// Continues from the journal. Operations that were running when the last daemon ended stay running
    /// until [`Operations::fail_orphans`].
    pub fn new(stored: Vec<Operation>, journal: Addr<Journal>) -> Self {
        let mut by_id = BTreeMap::new();
        for operation in stored {
            let Some(id) = number(&operation.id) else {
                continue;
            };
            let entry = match encode(&operation) {
                Ok(json) if operation.is_over() => Entry::Over(json),
                _ => Entry::UnderWay {
                    operation: Box::new(operation),
                    cancel: watch::channel(false).0,
                },
            };
            by_id.insert(id, entry);
        }
        let next_id = by_id.keys().next_back().map_or(1, |last| last + 1);
        let (changed, _) = watch::channel(0);
        let table = Mutex::new(Table { by_id, next_id });
        Self {
            inner: Arc::new(Inner {
                table,
                changed,
                journal,
            }),
        }
    }

    /// Begins an operation.
    ///
    /// # Errors
    /// When [`OPERATIONS_RUNNING_MAX`] are under way.
    pub fn begin(
        &self,
        kind: OperationKind,
        instance: &str,
        requested_by: Option<u32>,
    ) -> Result<Handle, Failure> {
        let (id, operation, receiver) = {
            let mut table = self.table();
            let running = table.by_id.values().filter(|e| !e.is_over()).count();
            if running >= OPERATIONS_RUNNING_MAX {
                let text = format!("{running} operations are under way, the most allowed");
                return Err(Failure::new(FailureKind::Busy, text).hint("try again later"));
            }
            let id = table.next_id;
            table.next_id += 1;
            let operation = Operation {
                id: format!("op-{id}"),
                kind,
                instance: instance.to_owned(),
                state: OperationState::Running,
                revision: 1,
                progress: Progress::default(),
                requested_by,
                started_at: wall_clock::now_rfc3339(),
                ended_at: None,
                error: None,
                result: None,
            };
            let (cancel, receiver) = watch::channel(false);
            table.by_id.insert(
                id,
                Entry::UnderWay {
                    operation: Box::new(operation.clone()),
                    cancel,
                },
            );
            table.drop_oldest();
            (id, operation, receiver)
        };
        if let Ok(json) = encode(&operation) {
            self.store(id, json);
        }
        Ok(Handle {
            operations: self.clone(),
            id,
            cancel: receiver,
            over: false,
        })
    }

    /// Fails all operations that are still running: an earlier daemon began them.
    pub fn fail_orphans(&self) {
        let orphans: Vec<_> = {
            let table = self.table();
            let running = table.by_id.iter().filter(|(_, e)| !e.is_over());
            running.map(|(id, _)| *id).collect()
        };
        for id in orphans {
            let text = "the daemon was restarted while this was under way";
            let error = Failure::new(FailureKind::Internal, text)
                .hint("look at the instance's status: what was begun has been finished or undone");
            self.change(id, |o| finish(o, OperationState::Failed, None, Some(error)));
        }
    }

    /// Returns one operation.
    ///
    /// # Errors
    /// When the id is unknown.
    pub fn get(&self, id: &str) -> Result<Operation, Failure> {
        let table = self.table();
        let found = number(id).and_then(|n| table.by_id.get(&n));
        found.ok_or_else(|| unknown(id))?.read()
    }

    /// Returns all stored operations, oldest first.
    pub fn list(&self) -> Vec<Operation> {
        self.table().by_id.values().flat_map(Entry::read).collect()
    }

    /// Returns the number of operations under way.
    pub fn running(&self) -> usize {
        self.table().by_id.values().filter(|e| !e.is_over()).count()
    }

    /// Requests the cancellation of all operations of this kind. Returns the number of them under way.
    pub fn cancel_all(&self, kind: OperationKind) -> usize {
        let table = self.table();
        let mut count = 0;
        for entry in table.by_id.values() {
            if let Entry::UnderWay { operation, cancel } = entry
                && operation.kind == kind
            {
                cancel.send_replace(true);
                count += 1;
            }
        }
        count
    }

    /// Wakes on each change of any operation.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// Requests the cancellation of an operation. The worker decides when to cancel.
    ///
    /// # Errors
    /// When the id is unknown, the operation is over, or its kind cannot be cancelled.
    pub fn cancel(&self, id: &str) -> Result<Operation, Failure> {
        let table = self.table();
        let entry = number(id)
            .and_then(|n| table.by_id.get(&n))
            .ok_or_else(|| unknown(id))?;
        let Entry::UnderWay { operation, cancel } = entry else {
            let text = format!("operation {id} is over, there is nothing to cancel");
            return Err(Failure::new(FailureKind::WrongState, text));
        };
        if let Some(instead) = instead_of_cancelling(operation) {
            let text = format!(
                "operation {id} cannot be cancelled: only a morph or a capture can be undone"
            );
            return Err(Failure::new(FailureKind::WrongState, text).hint(instead));
        }
        cancel.send_replace(true);
        Ok(Operation::clone(operation))
    }

    fn change(&self, id: u64, edit: impl FnOnce(&mut Operation)) {
        let stored = {
            let mut table = self.table();
            let Some(entry) = table.by_id.get_mut(&id) else {
                return;
            };
            let Entry::UnderWay { operation, .. } = entry else {
                return;
            };
            edit(operation);
            operation.revision += 1;
            let json = match operation.is_over() {
                true => encode(operation).ok(),
                false => None,
            };
            if let Some(json) = &json {
                *entry = Entry::Over(Arc::clone(json));
            }
            json
        };
        if let Some(json) = stored {
            self.store(id, json);
        }
        self.inner.changed.send_modify(|n| *n += 1);
    }

    /// Progress is not stored: a later daemon needs only the beginning and the end.
    fn store(&self, id: u64, json: Arc<str>) {
        let change = Change::Operation(id, json);
        self.inner.journal.do_send(Record(vec![change]));
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.inner
            .table
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn drop_oldest(&mut self) {
        while self.by_id.len() as u64 > OPERATIONS_KEPT {
            let over = self
                .by_id
                .iter()
                .find(|(_, e)| e.is_over())
                .map(|(id, _)| *id);
            let Some(id) = over else { return };
            self.by_id.remove(&id);
        }
    }
}

impl Handle {
    /// Returns the operation's id, as clients use it.
    pub fn id(&self) -> String {
        format!("op-{}", self.id)
    }

    /// Returns the current state of the operation.
    pub fn snapshot(&self) -> Option<Operation> {
        self.operations.get(&self.id()).ok()
    }

    /// Sets the current step.
    pub fn step(&self, step: impl Into<String>) {
        let step = step.into();
        self.operations.change(self.id, |o| {
            o.progress = Progress {
                step,
                ..Progress::default()
            }
        });
    }

    /// Sets the progress of the current step.
    pub fn progress(&self, progress: Progress) {
        self.operations.change(self.id, |o| o.progress = progress);
    }

    /// Returns true once a cancellation was requested.
    pub fn cancel_requested(&self) -> bool {
        *self.cancel.borrow()
    }

    /// Completes when a cancellation is requested.
    pub fn cancelled(&self) -> impl Future<Output = ()> + 'static {
        let mut cancel = self.cancel.clone();
        async move {
            if cancel.wait_for(|asked| *asked).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends the operation with success.
    pub fn succeed(mut self, result: Option<OperationResult>) {
        self.end(OperationState::Succeeded, result, None);
    }

    /// Ends the operation with an error.
    pub fn fail(mut self, error: Failure, result: Option<OperationResult>) {
        self.end(OperationState::Failed, result, Some(error));
    }

    /// Ends the operation as cancelled.
    pub fn undone(mut self, result: Option<OperationResult>) {
        self.end(OperationState::Cancelled, result, None);
    }

    fn end(
        &mut self,
        state: OperationState,
        result: Option<OperationResult>,
        error: Option<Failure>,
    ) {
        self.over = true;
        self.operations
            .change(self.id, |o| finish(o, state, result, error));
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.over {
            let text = "the work ended without a result, by a fault in kmorphd";
            let error = Failure::new(FailureKind::Internal, text)
                .hint("look at the daemon's log and the instance's status");
            self.end(OperationState::Failed, None, Some(error));
        }
    }
}

fn finish(
    operation: &mut Operation,
    state: OperationState,
    result: Option<OperationResult>,
    error: Option<Failure>,
) {
    operation.state = state;
    operation.result = result;
    operation.error = error;
    operation.ended_at = Some(wall_clock::now_rfc3339());
}

fn number(id: &str) -> Option<u64> {
    id.strip_prefix("op-")?.parse().ok()
}

fn unknown(id: &str) -> Failure {
    Failure::new(
        FailureKind::NotFound,
        format!("there is no operation {id:?}"),
    )
    .hint(Command::ListOperations)
}

/// Returns the command to use instead of a cancellation, if the operation cannot be cancelled.
fn instead_of_cancelling(operation: &Operation) -> Option<Command> {
    let instance = operation.instance.clone();
    match operation.kind {
        OperationKind::Morph | OperationKind::MorphPrepare | OperationKind::VmcoreCapture => None,
        OperationKind::Spawn => Some(Command::Terminate { instance }),
        OperationKind::MorphValidate | OperationKind::MorphCommit => {
            Some(Command::RollBackMorph { instance })
        }
        OperationKind::Terminate
        | OperationKind::Recover
        | OperationKind::MorphRollback
        | OperationKind::Doctor => Some(Command::WatchOperation {
            operation: operation.id.clone(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix::test]
    async fn dropped_work_fails_its_operation_and_orphans_fail_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let operations = Operations::new(Vec::new(), journal.clone());
        let handle = operations.begin(OperationKind::Spawn, "web", None).unwrap();
        let id = handle.id();
        assert_eq!(operations.get(&id).unwrap().state, OperationState::Running);
        drop(handle);
        let ended = operations.get(&id).unwrap();
        assert_eq!(ended.state, OperationState::Failed);
        assert_eq!(ended.error.unwrap().kind, FailureKind::Internal);

        let running = operations
            .begin(OperationKind::Morph, "web", Some(7))
            .unwrap();
        let stored = operations.list();
        let after = Operations::new(stored, journal);
        after.fail_orphans();
        assert_eq!(
            after.get(&running.id()).unwrap().state,
            OperationState::Failed
        );
        let next = after.begin(OperationKind::Spawn, "db", None).unwrap();
        assert_ne!(next.id(), running.id(), "ids only grow");
        next.succeed(None);
        running.succeed(None);
        arbiter.stop();
        arbiter.join().unwrap();
    }

    #[actix::test]
    async fn cancelling_reaches_the_worker_once_and_not_after_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _, arbiter) = Journal::open(dir.path()).unwrap();
        let operations = Operations::new(Vec::new(), journal);
        let handle = operations.begin(OperationKind::Morph, "web", None).unwrap();
        let id = handle.id();
        operations.cancel(&id).unwrap();
        handle.cancelled().await;
        assert!(handle.cancel_requested());
        handle.undone(None);
        let spawn = operations.begin(OperationKind::Spawn, "db", None).unwrap();
        let refused = operations.cancel(&spawn.id()).unwrap_err();
        assert_eq!(refused.kind, FailureKind::WrongState);
        assert!(!spawn.cancel_requested());
        spawn.succeed(None);
        assert_eq!(
            operations.cancel(&id).unwrap_err().kind,
            FailureKind::WrongState
        );
        assert_eq!(
            operations.cancel("op-999").unwrap_err().kind,
            FailureKind::NotFound
        );
        arbiter.stop();
        arbiter.join().unwrap();
    }
}
