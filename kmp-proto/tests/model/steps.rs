//! The steps that are possible in a state.

use std::time::Duration;

use kmp_proto::instance;
use kmp_proto::message::Side;
use kmp_proto::morph::Stage;
use kmp_proto::recovery;

use crate::kernel::{Ask, Life, Session};
use crate::machines::Gen;
use crate::model::Model;
use crate::world::{Daemon, Deed, Job, Packet, State, Watch, Write};

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Current,
    /// The one that was replaced while it was paused.
    Replaced,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Deliver(Packet),
    /// It arrives and stays on its way as well.
    Double(Packet),
    Lose(Packet),
    /// A request has no answer in time.
    Unanswered(Who, Ask),
    /// A timer of the morph fires.
    Tick(Who),
    /// A timer of the recovery fires.
    RecoveryTick,
    Healthy,
    TargetHealthy,
    Verdict,
    TargetVerdict,
    /// The journal carries out its oldest write.
    Written,
    RecordFails,
    Done(Deed),
    /// A fence is not confirmed, or a target not started.
    Fails(Deed),
    CaptureFails,
    /// From now on no fence of this generation is confirmed.
    Stuck(Gen),
    JobOver(Who),
    BackOffOver,
    Granted,
    LeaseOver(Gen),
    KernelDies(Gen),
    /// From now on the agent refuses every request.
    Refuses(Gen),
    /// The daemon dies, or is replaced while it is paused. The journal keeps so many of the writes under way, and the
    /// backend has carried out this work, by bit.
    DaemonDies {
        written: usize,
        deeds: usize,
    },
    DaemonPauses {
        written: usize,
        deeds: usize,
    },
    DaemonStarts,
    ReplacedEnds,
    AskMorph,
    AskRollback,
}

/// Why a step happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// By itself, sooner or later.
    Due,
    /// The same, and it may repeat until something else that is due happens.
    Waiting,
    Fault,
    /// Somebody wants it.
    Wish,
}

/// The longest wait of a retry; a timer that takes longer is a deadline.
const RETRY_MAX: Duration = recovery::FENCE_RETRY.saturating_mul(2);

impl Model {
    /// All steps that are possible.
    pub(crate) fn steps(&self, state: &State) -> Vec<(Step, Cause)> {
        let mut steps = Vec::new();
        self.steps_of_network(state, &mut steps);
        self.steps_of_kernels(state, &mut steps);
        match &state.daemon {
            None => steps.push((Step::DaemonStarts, Cause::Due)),
            Some(daemon) => {
                self.steps_of_talk(state, daemon, Who::Current, &mut steps);
                self.steps_of_watches(state, daemon, &mut steps);
                self.steps_of_machine(state, daemon, &mut steps);
                self.steps_of_instance(state, daemon, &mut steps);
                self.ends_of_daemon(state, daemon, &mut steps);
            }
        }
        if let Some(replaced) = &state.paused {
            self.steps_of_talk(state, replaced, Who::Replaced, &mut steps);
            steps.push((Step::ReplacedEnds, Cause::Due));
        }
        if state.faults == 0 {
            steps.retain(|(_, cause)| *cause != Cause::Fault);
        }
        steps
    }

    fn steps_of_network(&self, state: &State, steps: &mut Vec<(Step, Cause)>) {
        for packet in &state.network {
            steps.push((Step::Deliver(*packet), Cause::Due));
            steps.push((Step::Double(*packet), Cause::Fault));
            steps.push((Step::Lose(*packet), Cause::Fault));
        }
    }

    fn steps_of_kernels(&self, state: &State, steps: &mut Vec<(Step, Cause)>) {
        for (at, kernel) in state.kernels.iter().enumerate() {
            let generation = Gen::try_from(at + 1).expect("few generations");
            if kernel.runs() {
                steps.push((Step::KernelDies(generation), Cause::Fault));
            }
            if kernel.runs() && !kernel.refuses {
                steps.push((Step::Refuses(generation), Cause::Fault));
            }
            if kernel.life != Life::Ended && !kernel.stuck {
                steps.push((Step::Stuck(generation), Cause::Fault));
            }
            if let Some(session) = kernel.leased(self.bound.mutations) {
                let cause = match self.freezes(state, session) {
                    true => Cause::Fault,
                    false => Cause::Due,
                };
                steps.push((Step::LeaseOver(generation), cause));
            }
        }
    }

    /// Whether a daemon is about to renew the lease of a session, or to end its wait.
    fn freezes(&self, state: &State, session: Session) -> bool {
        let daemon = state.daemon.as_ref().filter(|daemon| daemon.over.is_none());
        daemon.is_some_and(|daemon| match daemon.job {
            Job::Morph(id, row) => {
                let (stage, _) = self.morphs.facts(id);
                let frozen = matches!(
                    stage,
                    Stage::Freezing | Stage::LastRound | Stage::Activating | Stage::Recording
                );
                row.session == session && frozen
            }
            _ => false,
        })
    }

    /// Requests without an answer, timers, and the end of a job.
    fn steps_of_talk(
        &self,
        state: &State,
        daemon: &Daemon,
        who: Who,
        steps: &mut Vec<(Step, Cause)>,
    ) {
        // A daemon that was replaced may repeat itself until it ends.
        let due = match who {
            Who::Current => Cause::Due,
            Who::Replaced => Cause::Waiting,
        };
        for ask in &daemon.waiting {
            let cause = match self.may_be_answered(state, daemon, *ask) {
                Some(true) => Cause::Fault,
                Some(false) => due,
                None => Cause::Waiting,
            };
            steps.push((Step::Unanswered(who, *ask), cause));
        }
        if let (Job::Morph(id, _), None) = (daemon.job, daemon.over)
            && let Some(wait) = self.morphs.wait(id)
        {
            let cause = match wait <= RETRY_MAX {
                true => due,
                false => Cause::Fault,
            };
            steps.push((Step::Tick(who), cause));
        }
        if daemon.over.is_some() {
            steps.push((Step::JobOver(who), due));
        }
    }

    /// Whether a request or its answer is under way; `None` if it is not, and the kernel that was asked has ended.
    fn may_be_answered(&self, state: &State, daemon: &Daemon, ask: Ask) -> Option<bool> {
        let Job::Morph(_, row) = daemon.job else {
            return Some(false);
        };
        let mine = |packet: &Packet| match packet {
            Packet::Request {
                from,
                session,
                ask: one,
                ..
            }
            | Packet::Reply {
                to: from,
                session,
                ask: one,
                ..
            } => (*from, *session, *one) == (daemon.incarnation, row.session, ask),
        };
        if state.network.iter().any(mine) {
            return Some(true);
        }
        let side = match ask.side() {
            Side::Source => row.source,
            Side::Target => row.target,
        };
        state.kernel(side).runs().then_some(false)
    }

    fn steps_of_watches(&self, state: &State, daemon: &Daemon, steps: &mut Vec<(Step, Cause)>) {
        let mut watch = |watch: Watch, generation: Gen, healthy: Step, verdict: Step| {
            let runs = state.kernel(generation).runs();
            if watch == Watch::Begun && runs {
                steps.push((healthy, Cause::Due));
            }
            match (watch, runs) {
                (Watch::Repeats, _) => steps.push((verdict, Cause::Due)),
                (watch, false) if watch.is_on() => steps.push((verdict, Cause::Due)),
                (watch, true) if watch.is_on() => steps.push((verdict, Cause::Fault)),
                _ => {}
            }
        };
        watch(daemon.watch, daemon.active, Step::Healthy, Step::Verdict);
        if let Job::Morph(_, row) = daemon.job {
            watch(
                daemon.target_watch,
                row.target,
                Step::TargetHealthy,
                Step::TargetVerdict,
            );
        }
    }

    /// The journal and the backend.
    fn steps_of_machine(&self, state: &State, daemon: &Daemon, steps: &mut Vec<(Step, Cause)>) {
        if let Some(write) = daemon.queue.first() {
            steps.push((Step::Written, Cause::Due));
            if *write == Write::CommitRecord {
                steps.push((Step::RecordFails, Cause::Fault));
            }
        }
        for deed in &daemon.deeds {
            match deed {
                Deed::Fence(generation) if state.kernel(*generation).stuck => {
                    steps.push((Step::Fails(*deed), Cause::Due));
                }
                Deed::Fence(_) | Deed::SpawnTarget(_) => {
                    steps.push((Step::Done(*deed), Cause::Due));
                    steps.push((Step::Fails(*deed), Cause::Fault));
                }
                Deed::Capture => {
                    steps.push((Step::Done(*deed), Cause::Due));
                    steps.push((Step::CaptureFails, Cause::Fault));
                }
                _ => steps.push((Step::Done(*deed), Cause::Due)),
            }
        }
    }

    fn steps_of_instance(&self, state: &State, daemon: &Daemon, steps: &mut Vec<(Step, Cause)>) {
        let facts = self.instances.facts(daemon.instance);
        match facts.stage {
            instance::Stage::BackingOff => steps.push((Step::BackOffOver, Cause::Due)),
            instance::Stage::Queued => steps.push((Step::Granted, Cause::Due)),
            _ => {}
        }
        if facts.may_morph && state.morphs > 0 && daemon.queue.is_empty() {
            steps.push((Step::AskMorph, Cause::Wish));
        }
        match (daemon.job, daemon.over) {
            (Job::Morph(..), None) => steps.push((Step::AskRollback, Cause::Fault)),
            (Job::Recovery(id, _), None) if self.recoveries.wait(id).is_some() => {
                steps.push((Step::RecoveryTick, Cause::Due));
            }
            _ => {}
        }
    }

    fn ends_of_daemon(&self, state: &State, daemon: &Daemon, steps: &mut Vec<(Step, Cause)>) {
        for written in 0..=daemon.queue.len() {
            for deeds in 0..1 << daemon.deeds.len() {
                steps.push((Step::DaemonDies { written, deeds }, Cause::Fault));
                if self.bound.paused && state.paused.is_none() {
                    steps.push((Step::DaemonPauses { written, deeds }, Cause::Fault));
                }
            }
        }
    }
}
