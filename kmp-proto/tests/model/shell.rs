//! The daemon's shells: they carry out what the engines want, and bring the results back. They follow
//! `actors/src/instance`, `actors/src/morph` and `actors/src/recovery`.

use kmp_proto::instance::WatchOrder;
use kmp_proto::message::Side;

use crate::bound::Mutation;
use crate::kernel::{Ask, Life};
use crate::machines::{
    End, Gen, InstanceEffect, InstanceEvent, MorphEffect, MorphEnd, MorphEvent, MorphOrigin,
    RecoveryEffect, RecoveryEvent, RecoveryOrigin,
};
use crate::model::Model;
use crate::world::{Daemon, Deed, Job, MorphRow, Over, Packet, Row, State, Watch, Write};

/// One daemon during one step.
pub(crate) struct Turn<'a> {
    pub(crate) model: &'a mut Model,
    pub(crate) state: &'a mut State,
    pub(crate) daemon: Daemon,
    /// It was replaced: it has neither the journal nor the backend any more, and only its messages reach anybody.
    pub(crate) replaced: bool,
}

impl Turn<'_> {
    fn has(&self, mutation: Mutation) -> bool {
        self.model.bound.mutations.has(mutation)
    }

    pub(crate) fn write(&mut self, write: Write) {
        if !self.replaced {
            self.daemon.queue.push(write);
        }
    }

    fn begin(&mut self, deed: Deed) {
        if !self.replaced {
            self.daemon.deeds.insert(deed);
        }
    }

    /// The morph that goes on, if there is one.
    pub(crate) fn morph_row(&self) -> Option<MorphRow> {
        match (self.daemon.job, self.daemon.over) {
            (Job::Morph(_, row), None) => Some(row),
            _ => None,
        }
    }

    fn ask(&mut self, ask: Ask) {
        let Some(row) = self.morph_row() else { return };
        let to = match ask.side() {
            Side::Source => row.source,
            Side::Target => row.target,
        };
        self.daemon.waiting.insert(ask);
        if self.state.kernel(to).runs() {
            self.state.network.insert(Packet::Request {
                from: self.daemon.incarnation,
                to,
                session: row.session,
                ask,
            });
        }
    }

    /// Tells the instance's engine.
    pub(crate) fn instance(&mut self, event: InstanceEvent) {
        let (id, effects) = self.model.instances.step(self.daemon.instance, event);
        self.daemon.instance = id;
        for effect in effects {
            self.instance_effect(effect);
        }
    }

    /// Tells the morph's engine; a session that has ended takes nothing.
    pub(crate) fn morph(&mut self, event: MorphEvent) {
        let (Job::Morph(id, row), None) = (self.daemon.job, self.daemon.over) else {
            return;
        };
        let (id, effects) = self.model.morphs.step(id, event);
        self.daemon.job = Job::Morph(id, row);
        for effect in effects {
            self.morph_effect(effect, row);
        }
    }

    /// Tells the recovery's engine; a recovery that has ended takes nothing.
    pub(crate) fn recovery(&mut self, event: RecoveryEvent) {
        let (Job::Recovery(id, failed), None) = (self.daemon.job, self.daemon.over) else {
            return;
        };
        let (id, effects) = self.model.recoveries.step(id, event);
        self.daemon.job = Job::Recovery(id, failed);
        for effect in effects {
            self.recovery_effect(effect, failed);
        }
    }

    pub(crate) fn instance_effect(&mut self, effect: InstanceEffect) {
        match effect {
            InstanceEffect::Watch(order) => match order {
                WatchOrder::Begin | WatchOrder::Adopt => self.daemon.watch = Watch::Begun,
                // The morph's watch is in its place already, if there was one.
                WatchOrder::TakeOver if self.daemon.watch == Watch::None => {
                    self.daemon.watch = Watch::Begun;
                }
                WatchOrder::End => self.daemon.watch = Watch::None,
                WatchOrder::TakeOver | WatchOrder::Pause | WatchOrder::Resume => {}
            },
            InstanceEffect::Save(wanted) => self.write(Write::Wanted(wanted)),
            InstanceEffect::Recover(respawn) => self.begin_recovery(respawn),
            InstanceEffect::Morph => self.begin_morph(),
            InstanceEffect::TellHealthy => {
                let generation = self.daemon.active;
                self.recovery(RecoveryEvent::SuccessorHealthy(generation));
            }
            InstanceEffect::TellSuccessorFailed => self.recovery(RecoveryEvent::SuccessorFailed),
            InstanceEffect::TellSourceFailed => self.morph(MorphEvent::Died(Side::Source)),
            InstanceEffect::EndRecovery => self.write(Write::RecoveryDone),
        }
    }

    /// The morph that is in the journal begins.
    fn begin_morph(&mut self) {
        let row = self.state.journal.morph.expect("it was planned");
        let origin = MorphOrigin::Begin(row.source, row.target);
        let (id, effects) = self.model.morphs.begin(origin);
        self.daemon.job = Job::Morph(id, row);
        self.begin(Deed::SpawnTarget(row.target));
        for effect in effects {
            self.morph_effect(effect, row);
        }
    }

    fn begin_recovery(&mut self, respawn: bool) {
        let failed = self.daemon.active;
        let origin = match self.state.journal.row(failed) {
            Row::Fenced => RecoveryOrigin::Fenced(failed, respawn),
            _ => RecoveryOrigin::New(failed, respawn),
        };
        let (id, effects) = self.model.recoveries.begin(origin);
        self.daemon.job = Job::Recovery(id, failed);
        for effect in effects {
            self.recovery_effect(effect, failed);
        }
    }

    pub(crate) fn morph_effect(&mut self, effect: MorphEffect, row: MorphRow) {
        match effect {
            MorphEffect::Prepare(Side::Source) => self.ask(Ask::PrepareSource),
            MorphEffect::Prepare(Side::Target) => self.ask(Ask::PrepareTarget),
            MorphEffect::Negotiate(Side::Source) => self.ask(Ask::NegotiateSource),
            MorphEffect::Negotiate(Side::Target) => self.ask(Ask::NegotiateTarget),
            MorphEffect::Round => self.ask(Ask::Export),
            MorphEffect::LastRound => self.ask(Ask::Hold),
            MorphEffect::Validate => self.ask(Ask::Validate),
            MorphEffect::Committable => self.morph(MorphEvent::Commit),
            MorphEffect::Freeze => self.ask(Ask::Freeze),
            MorphEffect::Activate => self.ask(Ask::Activate),
            MorphEffect::WriteCommitRecord => {
                self.write(Write::CommitRecord);
                if self.has(Mutation::ServeBeforeRecord) {
                    self.ask(Ask::Serve);
                }
            }
            MorphEffect::Serve => self.ask(Ask::Serve),
            MorphEffect::Retire => self.ask(Ask::Retire),
            MorphEffect::ResumeSource => self.ask(Ask::Resume),
            MorphEffect::Fence(Side::Source) => {
                self.instance(InstanceEvent::SourceLeft);
                self.order_fence(row.source);
            }
            MorphEffect::Fence(Side::Target) => {
                if self.daemon.deeds.contains(&Deed::SpawnTarget(row.target)) {
                    // The backend cannot confirm the end of what does not exist yet.
                    self.daemon.fence_waits = true;
                } else {
                    self.order_fence(row.target);
                }
            }
            MorphEffect::Finished(end) => {
                self.write(Write::MorphDone(end));
                self.daemon.waiting.clear();
                self.daemon.over = Some(Over::Morph(end));
            }
        }
    }

    fn order_fence(&mut self, generation: Gen) {
        self.reclaim_early(generation);
        self.write(Write::Ending(generation));
    }

    fn reclaim_early(&mut self, generation: Gen) {
        if self.has(Mutation::ReclaimedEarly) && !self.replaced {
            self.state.kernel_mut(generation).reclaimed = true;
        }
    }

    pub(crate) fn recovery_effect(&mut self, effect: RecoveryEffect, failed: Gen) {
        match effect {
            RecoveryEffect::Fence => {
                self.reclaim_early(failed);
                self.write(Write::Recovery(failed));
            }
            RecoveryEffect::Capture => self.begin(Deed::Capture),
            RecoveryEffect::Reclaim => self.begin(Deed::Release(failed)),
            RecoveryEffect::Respawn => self.write(Write::Succeeded),
            RecoveryEffect::Finished(end) => {
                self.write(Write::RecoveryDone);
                self.daemon.over = Some(Over::Recovery(end));
            }
        }
    }

    /// A request was answered.
    pub(crate) fn answered(&mut self, ask: Ask, done: bool) {
        if !self.daemon.waiting.remove(&ask) {
            return;
        }
        if !done {
            return self.refused(ask);
        }
        let event = match ask {
            Ask::PrepareSource => MorphEvent::Prepared(Side::Source),
            Ask::PrepareTarget => MorphEvent::Prepared(Side::Target),
            Ask::NegotiateSource => MorphEvent::Offered(Side::Source),
            Ask::NegotiateTarget => MorphEvent::Offered(Side::Target),
            Ask::Export => return self.ask(Ask::Import),
            Ask::Import | Ask::Hold => MorphEvent::RoundApplied,
            Ask::Validate => MorphEvent::Report,
            Ask::Freeze => MorphEvent::Frozen,
            Ask::Activate => MorphEvent::Activated,
            Ask::Serve => MorphEvent::Serving,
            Ask::Retire => MorphEvent::Retired,
            Ask::Resume => MorphEvent::SourceRunning,
        };
        self.morph(event);
    }

    fn refused(&mut self, ask: Ask) {
        let Some(row) = self.morph_row() else { return };
        // A source that refuses the session is asked by a heartbeat whether it serves.
        if ask == Ask::Resume && self.state.kernel(row.source).serves() {
            return self.morph(MorphEvent::SourceRunning);
        }
        self.morph(MorphEvent::Refused(ask.side()));
    }

    /// A write is durable.
    pub(crate) fn written(&mut self, write: Write) {
        match write {
            Write::Ending(generation) | Write::Recovery(generation) => {
                self.begin(Deed::Fence(generation));
            }
            Write::Fenced(generation) => match self.daemon.job {
                Job::Recovery(_, failed) if failed == generation => {
                    self.recovery(RecoveryEvent::Fenced);
                }
                _ => self.begin(Deed::Release(generation)),
            },
            Write::Released(generation) => match self.daemon.job {
                Job::Recovery(_, failed) if failed == generation => {
                    self.recovery(RecoveryEvent::Released);
                }
                Job::Morph(_, row) if row.source == generation => {
                    self.morph(MorphEvent::Fenced(Side::Source));
                }
                Job::Morph(_, row) if row.target == generation => {
                    self.morph(MorphEvent::Fenced(Side::Target));
                }
                _ => {}
            },
            Write::CommitRecord => {
                self.morph(MorphEvent::RecordDurable);
                if self.has(Mutation::ResumeAfterRecord) {
                    self.ask(Ask::Resume);
                }
            }
            Write::Succeeded => self.begin(Deed::SpawnSuccessor(self.state.journal.newest())),
            Write::MorphDone(_) | Write::RecoveryDone | Write::Wanted(_) => {}
        }
    }

    /// The backend has done something.
    pub(crate) fn done(&mut self, deed: Deed) {
        match deed {
            Deed::SpawnTarget(_) => self.target_started(true),
            Deed::SpawnSuccessor(generation) => {
                self.daemon.active = generation;
                self.instance(InstanceEvent::SuccessorStarted);
                self.recovery(RecoveryEvent::SuccessorStarted);
            }
            Deed::Fence(generation) => self.write(Write::Fenced(generation)),
            Deed::Capture => self.recovery(RecoveryEvent::Captured),
            Deed::Release(generation) => self.write(Write::Released(generation)),
        }
    }

    /// The start of the target is over.
    pub(crate) fn target_started(&mut self, runs: bool) {
        let Some(row) = self.morph_row() else { return };
        let waits = std::mem::take(&mut self.daemon.fence_waits);
        match runs {
            true if !waits => self.daemon.target_watch = Watch::Begun,
            true => {}
            false => self.morph(MorphEvent::NotStarted),
        }
        if waits {
            self.order_fence(row.target);
        }
    }

    /// A fence was not confirmed.
    pub(crate) fn unconfirmed(&mut self, generation: Gen) {
        match self.daemon.job {
            Job::Recovery(_, failed) if failed == generation => {
                self.recovery(RecoveryEvent::FenceUnconfirmed);
            }
            Job::Morph(_, row) if row.source == generation => {
                self.morph(MorphEvent::FenceUnconfirmed(Side::Source));
            }
            Job::Morph(_, row) if row.target == generation => {
                self.morph(MorphEvent::FenceUnconfirmed(Side::Target));
            }
            // The daemon tries a leftover again and again; here once, since nothing follows from it.
            _ => self.daemon.told_person = true,
        }
    }

    /// The instance takes the message that its job is over.
    pub(crate) fn job_over(&mut self, over: Over) {
        let job = std::mem::replace(&mut self.daemon.job, Job::None);
        self.daemon.over = None;
        match (over, job) {
            (Over::Morph(end), Job::Morph(_, row)) => {
                let watch = std::mem::replace(&mut self.daemon.target_watch, Watch::None);
                if end.owner() == Side::Target {
                    self.daemon.active = row.target;
                    self.daemon.watch = self.handed_over(watch);
                }
                self.daemon.told_person |= matches!(end, MorphEnd::Operator(..));
                self.instance(InstanceEvent::MorphOver(end));
            }
            (Over::Recovery(end), _) => {
                self.daemon.told_person |= end == End::Operator;
                self.instance(InstanceEvent::RecoveryOver(end));
            }
            (Over::Morph(_), _) => unreachable!("a morph ends a morph"),
        }
    }

    /// The watch of the target gets a new owner, and repeats its verdict to it.
    fn handed_over(&self, watch: Watch) -> Watch {
        match watch {
            Watch::Judged if !self.has(Mutation::VerdictNotRepeated) => Watch::Repeats,
            watch => watch,
        }
    }

    /// Whether a restarted daemon finds that a generation has ended or is to end.
    pub(crate) fn has_ended(&self, generation: Gen) -> bool {
        self.state.journal.row(generation) != Row::Kept
            || self.state.kernel(generation).life != Life::Runs
    }
}
