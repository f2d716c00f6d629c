//! The states that steps lead to.

use kmp_proto::message::Side;

use crate::arena::Arena;
use crate::bound::{Bound, Mutation};
use crate::kernel::Ask;
use crate::machines::{
    Gen, InstanceEvent, InstanceMachine, MorphEvent, MorphMachine, RecoveryEvent, RecoveryMachine,
    Wanted,
};
use crate::shell::Turn;
use crate::steps::{Step, Who};
use crate::world::{Daemon, Deed, Job, Journal, MorphRow, Packet, State, Watch, Write};

/// See the module.
pub(crate) struct Model {
    pub(crate) bound: Bound,
    pub(crate) morphs: Arena<MorphMachine>,
    pub(crate) recoveries: Arena<RecoveryMachine>,
    pub(crate) instances: Arena<InstanceMachine>,
}

impl Model {
    pub(crate) fn new(bound: Bound) -> Self {
        Self {
            bound,
            morphs: Arena::default(),
            recoveries: Arena::default(),
            instances: Arena::default(),
        }
    }

    /// One generation serves, and its daemon has just found that out.
    pub(crate) fn beginning(&mut self) -> State {
        let journal = Journal {
            rows: Vec::new(),
            active: 1,
            wanted: Wanted::Running,
            morph: None,
            recovery: None,
            incarnation: 0,
        };
        let mut state = State {
            kernels: Vec::new(),
            daemon: None,
            paused: None,
            journal,
            network: Default::default(),
            faults: self.bound.faults,
            morphs: self.bound.morphs,
            hurt: false,
            broken: None,
        };
        let first = state.intend();
        state.carry_out(Deed::SpawnSuccessor(first));
        self.start(&mut state);
        state = self.after(&state, Step::Healthy);
        self.after(&state, Step::AskMorph)
    }

    /// The state, for people.
    pub(crate) fn describe(&self, state: &State) -> String {
        let daemon = state.daemon.as_ref().map(|daemon| {
            let job = match daemon.job {
                Job::None => "none",
                Job::Morph(id, _) => self.morphs.stage(id),
                Job::Recovery(id, _) => self.recoveries.stage(id),
            };
            let instance = self.instances.stage(daemon.instance);
            format!("instance {instance}, job {job}, {daemon:?}")
        });
        format!("{daemon:?}\n  {:?}\n  {:?}", state.kernels, state.journal)
    }

    /// The state after a step.
    pub(crate) fn after(&mut self, before: &State, step: Step) -> State {
        let mut state = before.clone();
        match step {
            Step::Deliver(packet) => self.deliver(&mut state, packet, false),
            Step::Double(packet) => self.deliver(&mut state, packet, true),
            Step::Lose(packet) => drop(state.network.remove(&packet)),
            Step::KernelDies(generation) => {
                state.end(generation);
                state.hurt = true;
            }
            Step::Stuck(generation) => {
                state.kernel_mut(generation).stuck = true;
                state.hurt = true;
            }
            Step::Refuses(generation) => {
                state.kernel_mut(generation).refuses = true;
                state.hurt = true;
            }
            Step::LeaseOver(generation) => state.kernel_mut(generation).thaw(),
            Step::DaemonDies { written, deeds } => drop(self.cut_off(&mut state, written, deeds)),
            Step::DaemonPauses { written, deeds } => {
                state.paused = self.cut_off(&mut state, written, deeds);
            }
            Step::DaemonStarts => self.start(&mut state),
            Step::ReplacedEnds => state.paused = None,
            Step::Unanswered(who, _) | Step::Tick(who) | Step::JobOver(who) => {
                self.turn(&mut state, who, |turn| turn.talk(step));
            }
            _ => self.turn(&mut state, Who::Current, |turn| turn.act(step)),
        }
        self.forget_replies(&mut state);
        state
    }

    /// Has a daemon do something.
    fn turn(&mut self, state: &mut State, who: Who, act: impl FnOnce(&mut Turn<'_>)) {
        let place = match who {
            Who::Current => state.daemon.take(),
            Who::Replaced => state.paused.take(),
        };
        let daemon = place.expect("it is there");
        let mut turn = Turn {
            model: self,
            state,
            daemon,
            replaced: who == Who::Replaced,
        };
        act(&mut turn);
        let daemon = turn.daemon;
        match who {
            Who::Current => state.daemon = Some(daemon),
            Who::Replaced => state.paused = Some(daemon),
        }
    }

    fn deliver(&mut self, state: &mut State, packet: Packet, stays: bool) {
        if !stays {
            state.network.remove(&packet);
        }
        match packet {
            Packet::Request {
                from,
                to,
                session,
                ask,
            } => {
                let mutations = self.bound.mutations;
                let kernel = state.kernel_mut(to);
                if from < kernel.seen {
                    if !mutations.has(Mutation::OlderIncarnation) {
                        // ERROR 18, and the connection ends.
                        return;
                    }
                    state.break_rule("a kernel obeys an older daemon");
                }
                let kernel = state.kernel_mut(to);
                kernel.seen = kernel.seen.max(from);
                let done = kernel.answer(ask, session, mutations);
                state.network.insert(Packet::Reply {
                    to: from,
                    session,
                    ask,
                    done,
                });
            }
            Packet::Reply {
                to,
                session,
                ask,
                done,
            } => {
                let takes = |daemon: &Option<Daemon>| {
                    daemon
                        .as_ref()
                        .is_some_and(|daemon| daemon.incarnation == to)
                };
                let who = match takes(&state.daemon) {
                    true => Who::Current,
                    false => Who::Replaced,
                };
                self.turn(state, who, |turn| {
                    if turn.morph_row().is_some_and(|row| row.session == session) {
                        turn.answered(ask, done);
                    }
                });
            }
        }
    }

    /// Replies that nobody waits for go away with their connection.
    fn forget_replies(&self, state: &mut State) {
        let waits = |daemon: &Option<Daemon>, to, session, ask: &Ask| {
            daemon.as_ref().is_some_and(|daemon| {
                let mine = match (daemon.job, daemon.over) {
                    (Job::Morph(_, row), None) => row.session == session,
                    _ => false,
                };
                mine && daemon.incarnation == to && daemon.waiting.contains(ask)
            })
        };
        let (daemon, paused) = (&state.daemon, &state.paused);
        state.network.retain(|packet| match packet {
            Packet::Request { .. } => true,
            Packet::Reply {
                to, session, ask, ..
            } => waits(daemon, *to, *session, ask) || waits(paused, *to, *session, ask),
        });
    }

    /// The daemon is cut off from its machine: a part of what was under way takes effect, and nobody is told.
    fn cut_off(&self, state: &mut State, written: usize, deeds: usize) -> Option<Daemon> {
        let mut daemon = state.daemon.take()?;
        let forgotten = self.bound.mutations.has(Mutation::RecordForgotten);
        for write in daemon.queue.drain(..).take(written) {
            state.make_durable(write, forgotten);
        }
        for (at, deed) in std::mem::take(&mut daemon.deeds).into_iter().enumerate() {
            let stuck = matches!(deed, Deed::Fence(generation) if state.kernel(generation).stuck);
            if deeds & (1 << at) != 0 && !stuck {
                self.carry_out(state, deed, daemon.job);
            }
        }
        Some(daemon)
    }

    /// Carries out work of the backend for this job. Only the recovery of a generation that was judged may end a kernel
    /// that serves.
    pub(crate) fn carry_out(&self, state: &mut State, deed: Deed, job: Job) {
        if let Deed::Fence(generation) = deed
            && state.kernel(generation).serves()
            && !matches!(job, Job::Recovery(_, failed) if failed == generation)
        {
            state.break_rule("a morph or a sweep ends the kernel that serves");
        }
        if let Deed::Fence(_) = deed
            && self.bound.mutations.has(Mutation::FenceNotDone)
        {
            return;
        }
        state.carry_out(deed);
    }
}

impl Turn<'_> {
    /// Steps of either daemon.
    fn talk(&mut self, step: Step) {
        match step {
            Step::Unanswered(_, ask) => {
                if self.daemon.waiting.remove(&ask) {
                    self.morph(MorphEvent::Unanswered(ask.side()));
                }
            }
            Step::Tick(_) => self.morph(MorphEvent::Tick),
            Step::JobOver(_) => {
                if let Some(over) = self.daemon.over {
                    self.job_over(over);
                }
            }
            _ => unreachable!("no talk: {step:?}"),
        }
    }

    /// Steps of the daemon that has the machine.
    fn act(&mut self, step: Step) {
        match step {
            Step::RecoveryTick => self.recovery(RecoveryEvent::Tick),
            Step::Healthy => {
                self.daemon.watch = Watch::Healthy;
                self.hear(self.daemon.active);
                self.instance(InstanceEvent::Healthy);
            }
            Step::TargetHealthy => {
                self.daemon.target_watch = Watch::Healthy;
                if let Job::Morph(_, row) = self.daemon.job {
                    self.hear(row.target);
                }
                self.morph(MorphEvent::TargetHealthy);
            }
            Step::Verdict => {
                self.state.hurt = true;
                self.daemon.watch = Watch::Judged;
                self.instance(InstanceEvent::Failed);
            }
            Step::TargetVerdict => {
                self.state.hurt = true;
                self.daemon.target_watch = Watch::Judged;
                self.morph(MorphEvent::Died(Side::Target));
            }
            Step::Written => self.next_write(),
            Step::RecordFails => {
                let write = self.daemon.queue.remove(0);
                if self.model.bound.mutations.has(Mutation::RecordDenied) {
                    self.state.make_durable(write, false);
                }
                self.morph(MorphEvent::RecordFailed);
            }
            Step::Done(deed) => {
                self.daemon.deeds.remove(&deed);
                self.model.carry_out(self.state, deed, self.daemon.job);
                self.done(deed);
            }
            Step::Fails(Deed::Fence(generation)) => {
                self.state.hurt = true;
                self.daemon.deeds.remove(&Deed::Fence(generation));
                self.unconfirmed(generation);
            }
            Step::Fails(deed) => {
                self.daemon.deeds.remove(&deed);
                self.target_started(false);
            }
            Step::CaptureFails => {
                self.daemon.deeds.remove(&Deed::Capture);
                self.recovery(RecoveryEvent::CaptureFailed);
            }
            Step::BackOffOver => self.instance(InstanceEvent::BackOffOver),
            Step::Granted => self.instance(InstanceEvent::Granted),
            Step::AskMorph => self.plan_morph(),
            Step::AskRollback => self.morph(MorphEvent::RollbackRequested),
            _ => unreachable!("nobody's step: {step:?}"),
        }
    }

    /// A heartbeat was answered: the kernel knows this daemon.
    fn hear(&mut self, generation: Gen) {
        let kernel = self.state.kernel_mut(generation);
        kernel.seen = kernel.seen.max(self.daemon.incarnation);
    }

    fn next_write(&mut self) {
        let write = self.daemon.queue.remove(0);
        let forgotten = self.model.bound.mutations.has(Mutation::RecordForgotten);
        if write == Write::Succeeded && !self.state.hurt {
            self.state
                .break_rule("a workload without a fault is started anew");
        }
        self.state.make_durable(write, forgotten);
        self.written(write);
    }

    /// An operator asks for a morph: it is in the journal before the engine is asked.
    fn plan_morph(&mut self) {
        self.state.morphs -= 1;
        let session = self.state.journal.morph.map_or(1, |row| row.session + 1);
        let reuse = self.model.bound.mutations.has(Mutation::GenerationReused);
        let target = match reuse && self.state.journal.newest() > self.daemon.active {
            false => self.state.intend(),
            true => {
                self.state.break_rule("a generation's number is used twice");
                self.state.journal.newest()
            }
        };
        self.state.journal.morph = Some(MorphRow {
            session,
            source: self.daemon.active,
            target,
            committed: false,
            end: None,
        });
        self.instance(InstanceEvent::AskedMorph);
    }
}
