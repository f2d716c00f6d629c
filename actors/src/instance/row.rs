//! The row of the instance in the journal. Only this actor changes it, one write at a time, so that no write depends on
//! an unconfirmed earlier one. Recoveries and morphs propose their changes. (The supervisor inserts the row and changes
//! its policy, which no other write touches; the end of the instance deletes the row.)
//!
//! ```text
//! wanted (Save) ──┐
//! wish ───────────┤▶ [queue] ─▶ current row, changed ─▶ one transaction ─▶ durable: becomes the current row
//! proposal ───────┘             with the proposer's own changes           └ refused: the row stays
//! ```

use std::collections::VecDeque;
use std::ops::Deref;

use actix::prelude::*;
use slog::warn;
use tokio::sync::oneshot;

use super::Instance;
use crate::model::rows::InstanceRow;
use crate::platform::journal::{Change, JournalError, Proposal, Propose, record};

/// Maximum number of writes that wait for the disk. The engine needs a handful; the rest are reports.
const WRITES_MAX: usize = 64;

type Then = Box<dyn FnOnce(&mut Instance, Result<(), JournalError>, &mut Context<Instance>)>;

/// The row, and the queue of writes.
pub(super) struct OwnRow {
    row: InstanceRow,
    queue: VecDeque<Write>,
    writing: bool,
}

struct Write {
    change: RowChange,
    with: Vec<Change>,
    then: Then,
}

enum RowChange {
    /// The desired state and its reason, read from the engine at the time of the write.
    Wanted,
    /// No change of the row.
    Nothing,
    Proposal(Proposal),
}

impl OwnRow {
    pub(super) fn new(row: InstanceRow) -> Self {
        Self {
            row,
            queue: VecDeque::new(),
            writing: false,
        }
    }

    /// Changes the row in memory; the next write includes the change.
    pub(super) fn amend(&mut self, change: impl FnOnce(&mut InstanceRow)) {
        change(&mut self.row);
    }
}

impl OwnRow {
    /// Removes the waiting reports from the queue.
    fn take_reports(&mut self) -> Vec<Change> {
        let (reports, others) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition(|write| matches!(write.change, RowChange::Nothing));
        self.queue = others;
        let reports: VecDeque<Write> = reports;
        reports.into_iter().flat_map(|write| write.with).collect()
    }

    /// Drops the waiting reports of an instance that is about to be forgotten, so that none of them writes the row
    /// again.
    pub(super) fn drop_reports(&mut self) {
        self.take_reports();
    }
}

impl Deref for OwnRow {
    type Target = InstanceRow;

    fn deref(&self) -> &InstanceRow {
        &self.row
    }
}

impl Instance {
    /// Writes the desired state of the instance, and its reason.
    pub(super) fn save(&mut self, ctx: &mut Context<Self>) {
        let queued = |write: &Write| matches!(write.change, RowChange::Wanted);
        if !self.row.queue.iter().any(queued) {
            self.write(RowChange::Wanted, Vec::new(), Box::new(|_, _, _| {}), ctx);
        }
    }

    /// Writes the row unchanged, with reports that may be lost if the disk is too slow.
    pub(super) fn report(&mut self, with: Vec<Change>, ctx: &mut Context<Self>) {
        if self.row.queue.len() >= WRITES_MAX {
            warn!(self.log, "a report was not recorded: the journal is too slow";
                "generation" => self.generation.generation);
            return;
        }
        self.write(RowChange::Nothing, with, Box::new(|_, _, _| {}), ctx);
    }

    /// Writes a change of the row; `then` receives the result once it is durable or refused.
    pub(super) fn propose(
        &mut self,
        Propose { proposal, with }: Propose,
        ctx: &mut Context<Self>,
        then: impl FnOnce(&mut Self, Result<(), JournalError>, &mut Context<Self>) + 'static,
    ) {
        let change = RowChange::Proposal(proposal);
        self.write(change, with, Box::new(then), ctx);
    }

    fn write(&mut self, change: RowChange, with: Vec<Change>, then: Then, ctx: &mut Context<Self>) {
        self.row.queue.push_back(Write { change, with, then });
        if !self.row.writing {
            self.write_next(ctx);
        }
    }

    fn write_next(&mut self, ctx: &mut Context<Self>) {
        let Some(Write { change, with, then }) = self.row.queue.pop_front() else {
            return;
        };
        if let RowChange::Wanted = change {
            // The decision holds even if the write fails.
            self.row.row.desired = self.engine.desired();
            self.row.row.reason = self.engine.rests_because();
        }
        let mut row = self.row.row.clone();
        if let RowChange::Proposal(proposal) = &change {
            proposal.apply(&mut row);
        }
        let mut changes = vec![Change::Instance(Box::new(row))];
        changes.extend(with);
        // One transaction for all waiting reports: a commit record must not queue behind them.
        changes.extend(self.row.take_reports());
        self.row.writing = true;
        let journal = self.services.platform.journal.clone();
        let written = async move { record(&journal, changes).await };
        ctx.spawn(written.into_actor(self).map(|written, act, ctx| {
            if let (Ok(()), RowChange::Proposal(proposal)) = (&written, change) {
                proposal.apply(&mut act.row.row);
            }
            act.row.writing = false;
            then(act, written, ctx);
            if !act.row.writing {
                act.write_next(ctx);
            }
        }));
    }
}

impl Handler<Propose> for Instance {
    type Result = ResponseFuture<Result<(), JournalError>>;

    fn handle(&mut self, propose: Propose, ctx: &mut Self::Context) -> Self::Result {
        let (answer, written) = oneshot::channel();
        self.propose(propose, ctx, |_, result, _| drop(answer.send(result)));
        Box::pin(async move { written.await.unwrap_or(Err(JournalError::Gone)) })
    }
}
