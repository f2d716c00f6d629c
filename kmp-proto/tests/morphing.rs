//! The morph engine against a model of both kernels, the journal and the backend, on virtual time, with loss, failure
//! and death at any moment, including death of the daemon.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use kmp_proto::fence::{Confirmation, FenceMethod};
use kmp_proto::message::{Check, CheckResult, ProviderOffer, Side, StateProvider, capability};
use kmp_proto::morph::{
    Action, Answer, CommitLimit, CommitRecord, Config, Engine, Event, Offer, Outcome, Stage,
};
use kmp_proto::time::Instant;
use proptest::prelude::*;

const SOURCE: u64 = 7;
const TARGET: u64 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    Serving,
    Frozen,
    Waiting,
    Ready,
    Dead,
}

/// A fault, and the step of the run at which it occurs.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Lose,
    KillSource,
    KillTarget,
    RestartDaemon,
    Rollback,
    Nothing,
}

struct World {
    engine: Engine,
    now: Instant,
    source: Kernel,
    target: Kernel,
    committed: bool,
    outcome: Option<Outcome>,
}

fn config() -> Config {
    Config {
        phase_timeout: Duration::from_secs(60),
        expiry: Duration::from_secs(600),
        downtime_budget: Duration::from_millis(10),
        step_overhead: Duration::from_millis(2),
        preference: StateProvider::ALL,
        required_kinds: capability::MEMORY,
        possible_modes: capability::BY_REFERENCE | capability::ROUNDS,
        validate_on_request: false,
    }
}

fn offer() -> Offer {
    Offer {
        providers: vec![ProviderOffer {
            provider: StateProvider::Cooperative,
            memory_bytes: 0,
            dirty_bytes_per_s: 0,
            state_kinds: capability::MEMORY,
            modes: capability::ROUNDS,
            state_version: 1,
            why_not: String::new(),
        }],
        ..Offer::default()
    }
}

fn passed() -> Vec<Check> {
    let name = "index".to_owned();
    vec![Check {
        name,
        result: CheckResult::Passed,
        duration_us: 1,
        detail: String::new(),
    }]
}

impl World {
    fn new() -> Self {
        let now = Instant::default();
        let engine = Engine::new(config(), SOURCE, TARGET, now);
        let (source, target) = (Kernel::Serving, Kernel::Waiting);
        Self {
            engine,
            now,
            source,
            target,
            committed: false,
            outcome: None,
        }
    }

    /// Applies an action to the model, and returns the event that answers the action, unless the answer is lost.
    fn act(&mut self, action: Action) -> Option<Event> {
        let certify = |order: kmp_proto::fence::FenceOrder| {
            order.confirm(FenceMethod::ProcessesKilled, Confirmation::ProcessesGone, 1)
        };
        match action {
            Action::Prepare(Side::Target) | Action::Negotiate(Side::Target) | Action::Validate
                if self.target == Kernel::Dead =>
            {
                None
            }
            Action::Prepare(Side::Source) | Action::Negotiate(Side::Source) | Action::Retire
                if self.source == Kernel::Dead =>
            {
                None
            }
            Action::Prepare(side) => Some(Event::Prepared(side)),
            Action::Negotiate(side) => Some(Event::Offered(side, offer())),
            Action::Round { .. } if self.target == Kernel::Dead || self.source == Kernel::Dead => {
                None
            }
            Action::Round { .. } => {
                let took = Duration::from_millis(1);
                Some(Event::RoundApplied {
                    sent_bytes: 1 << 20,
                    dirty_bytes: 0,
                    took,
                })
            }
            Action::Validate => Some(Event::Report(passed())),
            Action::Committable(_) => Some(Event::CommitRequested {
                limit: CommitLimit::Planned,
                or_roll_back: false,
            }),
            Action::Freeze if self.source == Kernel::Serving => {
                self.source = Kernel::Frozen;
                Some(Event::Frozen(5))
            }
            Action::Activate if self.target == Kernel::Waiting => {
                self.target = Kernel::Ready;
                Some(Event::Activated(5))
            }
            Action::WriteCommitRecord(order) => {
                self.committed = true;
                Some(Event::RecordDurable(order.recorded()))
            }
            Action::Serve(_) if self.target != Kernel::Dead => {
                assert!(self.committed, "SERVE before the commit record");
                self.target = Kernel::Serving;
                Some(Event::Serving)
            }
            Action::Retire => {
                self.source = Kernel::Dead;
                Some(Event::Retired)
            }
            Action::Fence(Side::Source, order) => {
                assert!(
                    self.committed,
                    "the source kernel is fenced only after the commit record"
                );
                self.source = Kernel::Dead;
                Some(Event::Fenced(Side::Source, certify(order)))
            }
            Action::Fence(Side::Target, order) => {
                assert!(
                    !self.committed,
                    "the target kernel is fenced only before the commit record"
                );
                self.target = Kernel::Dead;
                Some(Event::Fenced(Side::Target, certify(order)))
            }
            Action::ResumeSource(_) if self.source != Kernel::Dead => {
                assert_eq!(
                    self.target,
                    Kernel::Dead,
                    "the source kernel resumes beside a new one"
                );
                self.source = Kernel::Serving;
                Some(Event::SourceRunning)
            }
            Action::Finished(outcome) => {
                self.outcome = Some(outcome);
                None
            }
            _ => None,
        }
    }

    fn check(&self) {
        let both = self.source == Kernel::Serving && self.target == Kernel::Serving;
        assert!(!both, "both kernels serve");
    }

    fn tell(&mut self, event: Event) {
        self.engine.handle(event, self.now);
    }

    /// Runs until the engine is done; `fault` occurs at the `at`-th action.
    fn run(&mut self, fault: Fault, at: usize, lose_also: usize) {
        self.tell(Event::TargetHealthy);
        let mut step = 0;
        while self.outcome.is_none() {
            let Some(action) = self.engine.poll_action() else {
                let Some(due) = self.engine.poll_timeout() else {
                    panic!("waits without a deadline")
                };
                self.now = self.now.max(due);
                if self.source == Kernel::Dead {
                    self.tell(Event::Died(Side::Source, "gone".into()));
                }
                if self.target == Kernel::Dead {
                    self.tell(Event::Died(Side::Target, "gone".into()));
                }
                self.tell(Event::Tick);
                continue;
            };
            if step == at {
                match fault {
                    Fault::KillSource => self.source = Kernel::Dead,
                    Fault::KillTarget => self.target = Kernel::Dead,
                    Fault::Rollback => self.tell(Event::RollbackRequested("asked".into())),
                    Fault::RestartDaemon => {
                        self.engine = match self.committed {
                            true => {
                                let record = CommitRecord::restore_from_journal(SOURCE, TARGET);
                                Engine::resume_committed(record, self.now)
                            }
                            false => Engine::resume_uncommitted(SOURCE, TARGET),
                        };
                        step += 1;
                        continue;
                    }
                    Fault::Lose | Fault::Nothing => {}
                }
            }
            let fence = matches!(action, Action::Fence(..));
            let lost = (matches!(fault, Fault::Lose) && step == at) || step == lose_also;
            let answer = self.act(action);
            self.check();
            if let Some(event) = answer
                && (!lost || fence || matches!(event, Event::RecordDurable(_)))
            {
                self.tell(event);
            }
            step += 1;
            assert!(step < 1000, "does not end");
        }
    }
}

/// From the last answer before the commit record until the record is durable, a request for rollback is refused as too
/// late.
#[test]
fn while_the_commit_is_recorded_the_way_back_is_refused_and_before_and_after_the_answer_is_as_clear()
 {
    let mut world = World::new();
    let ask = |world: &mut World| {
        let asked = Event::RollbackRequested("asked".into());
        world.engine.handle(asked, world.now)
    };
    world.tell(Event::TargetHealthy);
    while world.outcome.is_none() {
        let action = world
            .engine
            .poll_action()
            .expect("a quiet morph needs no clock");
        if matches!(action, Action::WriteCommitRecord(_)) {
            let stage = Stage::Recording;
            assert_eq!(ask(&mut world), Answer::Refused { stage });
            assert_eq!(world.engine.poll_action(), None);
        }
        if let Some(event) = world.act(action) {
            world.tell(event);
        }
    }
    assert_eq!(world.outcome, Some(Outcome::Committed));
    let stage = Stage::Done;
    assert_eq!(ask(&mut world), Answer::Refused { stage });

    let mut world = World::new();
    assert_eq!(ask(&mut world), Answer::Accepted);
    assert_eq!(ask(&mut world), Answer::Accepted, "it is under way");
    let limit = CommitLimit::None;
    let or_roll_back = false;
    let commit = Event::CommitRequested {
        limit,
        or_roll_back,
    };
    let stage = Stage::FencingTarget;
    assert_eq!(
        world.engine.handle(commit, world.now),
        Answer::Refused { stage }
    );
}

#[test]
fn a_quiet_morph_commits() {
    let mut world = World::new();
    world.run(Fault::Nothing, 0, usize::MAX);
    assert_eq!(world.outcome, Some(Outcome::Committed));
    assert_eq!(
        (world.source, world.target),
        (Kernel::Dead, Kernel::Serving)
    );
}

#[test]
fn a_commit_over_the_budget_is_refused_unless_forced_and_changes_nothing() {
    for force in [false, true] {
        let mut world = World::new();
        let slow = Config {
            step_overhead: Duration::from_millis(20),
            ..config()
        };
        world.engine = Engine::new(slow, SOURCE, TARGET, world.now);
        world.tell(Event::TargetHealthy);
        loop {
            match world.engine.poll_action().unwrap() {
                Action::Committable(estimate) => {
                    assert_eq!(estimate.total(), Duration::from_millis(20));
                    break;
                }
                action => {
                    if let Some(event) = world.act(action) {
                        world.tell(event);
                    }
                }
            }
        }
        world.tell(Event::CommitRequested {
            limit: if force {
                CommitLimit::None
            } else {
                CommitLimit::Planned
            },
            or_roll_back: false,
        });
        let next: Vec<_> = std::iter::from_fn(|| world.engine.poll_action()).collect();
        assert_eq!(next.contains(&Action::Freeze), force);
        assert_eq!(world.source, Kernel::Serving);
    }
}

#[test]
fn a_failed_check_and_an_empty_report_roll_back() {
    let mut bad = passed();
    bad[0].result = CheckResult::Failed;
    for checks in [bad, Vec::new()] {
        let mut world = World::new();
        world.tell(Event::TargetHealthy);
        while let Some(action) = world.engine.poll_action() {
            let event = match action {
                Action::Validate => Some(Event::Report(checks.clone())),
                action => world.act(action),
            };
            if let Some(event) = event {
                world.tell(event);
            }
        }
        assert!(
            matches!(world.outcome, Some(Outcome::RolledBack(_))),
            "{:?}",
            world.outcome
        );
        assert_eq!(
            (world.source, world.target),
            (Kernel::Serving, Kernel::Dead)
        );
    }
}

proptest! {
    #[test]
    fn whatever_dies_whenever_one_kernel_ends_up_serving(
        fault in prop_oneof![
            Just(Fault::Lose), Just(Fault::KillSource), Just(Fault::KillTarget),
            Just(Fault::RestartDaemon), Just(Fault::Rollback), Just(Fault::Nothing),
        ],
        at in 0usize..24,
        lose_also in prop_oneof![Just(usize::MAX), 0usize..24],
    ) {
        let mut world = World::new();
        world.run(fault, at, lose_also);
        let outcome = world.outcome.clone().unwrap();
        match outcome {
            Outcome::Committed => {
                prop_assert!(world.committed);
                prop_assert_eq!(world.source, Kernel::Dead);
                prop_assert!(matches!(world.target, Kernel::Serving | Kernel::Dead));
            }
            Outcome::CommittedButFailed(_) => {
                prop_assert!(world.committed);
                prop_assert_eq!(world.source, Kernel::Dead);
            }
            Outcome::RolledBack(_) => {
                prop_assert!(!world.committed);
                prop_assert_eq!(world.target, Kernel::Dead);
                // A further kill after the resume is not part of the morph.
                let killed = matches!(fault, Fault::KillSource) && world.source == Kernel::Dead;
                prop_assert!(killed || world.source == Kernel::Serving);
            }
            Outcome::SourceFailed { .. } => {
                prop_assert!(!world.committed);
                prop_assert_eq!(world.target, Kernel::Dead);
            }
            Outcome::OperatorActionNeeded { .. } => prop_assert!(false, "every fence is confirmed here"),
        }
    }
}
