//! The instance engine under any events.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use kmp_proto::instance::{
    Action, Answer, Condition, Desired, EndOrder, Engine, Event, Failure, JobNews, RecoveryEnd,
    Request, Stage, Successor, TRANSITIONS, WatchOrder, Wish,
};
use kmp_proto::message::{FailureCause, Side};
use kmp_proto::morph::{Outcome, RollbackReason, SourceFailure, TargetFailure};
use kmp_proto::time::Instant;
use kmp_proto::transition::Transition;

use super::{Choices, assert_row};

/// Maximum number of actions that one event causes.
const ACTIONS_MAX: usize = 8;

/// A job under way outside of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Recovery,
    Morph,
    Capture,
    End,
}

/// Facts so far, derived from the events and the actions.
#[derive(Debug, Default)]
struct Facts {
    job: Option<Job>,
    watched: bool,
    /// The watch has told its verdict: it tells nothing more.
    judged: bool,
    queued: bool,
    backing_off: bool,
    /// Wishes that the journal has not answered yet, in order.
    writing: VecDeque<Wish>,
    /// True if a termination is in the journal.
    terminating: bool,
    /// True if an operator must act before any heal.
    resting: bool,
    stopped: bool,
    /// True if the recovery that an earlier daemon began may be ended.
    unfinished: bool,
    /// The desired state in the journal.
    journal: Option<Desired>,
}

struct World {
    engine: Engine,
    now: Instant,
    facts: Facts,
    /// Steps taken: state, event, next state.
    steps: BTreeSet<Step>,
}

/// A step of an engine: state, event, next state.
pub type Step = (&'static str, &'static str, &'static str);

/// Drives an engine through the events that `bytes` encode.
///
/// # Panics
/// If a rule is broken.
pub fn run(bytes: &[u8]) {
    steps(bytes);
}

/// Like [`run`], but returns the steps that the engine took.
///
/// # Panics
/// If a rule is broken.
pub fn steps(bytes: &[u8]) -> BTreeSet<Step> {
    let mut choices = Choices::new(bytes);
    let now = Instant::default();
    let (engine, event) = begin(&mut choices, now);
    let mut facts = Facts {
        journal: Some(engine.desired()),
        unfinished: event == "adopted",
        ..Facts::default()
    };
    if event == "morphing" {
        facts.job = Some(Job::Morph);
    }
    let mut world = World {
        engine,
        now,
        facts,
        steps: BTreeSet::new(),
    };
    let effects = world.collect();
    let stage = world.engine.stage().as_str();
    let rows = TRANSITIONS.iter().copied().flatten();
    assert_row(rows, "–", event, stage, &effects);
    world.steps.insert(("–", event, stage));
    while let Some(choice) = choices.next() {
        if world.facts.stopped {
            assert_eq!(world.engine.stage(), Stage::Gone);
            break;
        }
        match choice {
            0..140 => world.go_on(&mut choices),
            140..160 => world.now = world.now + Duration::from_secs(u64::from(choices.byte())),
            160.. => {
                let event = any_event(&mut choices);
                if world.may_happen(&event) {
                    world.tell(event);
                }
            }
        }
    }
    world.steps
}

fn begin(choices: &mut Choices<'_>, now: Instant) -> (Engine, &'static str) {
    let auto_heal = choices.bit();
    match choices.byte() % 7 {
        0 => (Engine::adopted(auto_heal, true), "adopted"),
        6 => (Engine::adopted(auto_heal, false), "adopted"),
        1 => (Engine::morphing(auto_heal, choices.bit()), "morphing"),
        2 => {
            let desired = match choices.byte() % 3 {
                0 => Desired::Unhealed,
                1 => Desired::Resting,
                _ => Desired::OperatorAction,
            };
            let engine = Engine::resting(auto_heal, desired, Some("so it is".to_owned()));
            assert_eq!(engine.desired(), desired);
            (engine, "resting")
        }
        3 => (Engine::ending(auto_heal), "ending"),
        4 => {
            let decided = match choices.byte() % 4 {
                0 => None,
                1 => Some(Successor::ByPolicy),
                2 => Some(Successor::Asked),
                _ => Some(Successor::None),
            };
            let engine = Engine::failed(auto_heal, failure(), decided, now);
            (engine, "failed")
        }
        _ => (Engine::spawned(auto_heal), "spawned"),
    }
}

fn failure() -> Failure {
    Failure {
        cause: FailureCause::KernelDead,
        evidence: vec!["so it is".to_owned()],
    }
}

fn morph_outcome(choices: &mut Choices<'_>) -> Outcome {
    let text = || "so it is".to_owned();
    match choices.byte() % 6 {
        0 => Outcome::Committed,
        1 => Outcome::CommittedButFailed(TargetFailure::Died(text())),
        2 => Outcome::RolledBack(RollbackReason::DaemonRestarted),
        3 => Outcome::SourceFailed {
            reason: RollbackReason::DaemonRestarted,
            failure: SourceFailure::Died(text()),
        },
        side => Outcome::OperatorActionNeeded {
            side: if side == 4 {
                Side::Source
            } else {
                Side::Target
            },
            why: text(),
            target_failure: match side {
                4 if choices.bit() => Some(TargetFailure::Died(text())),
                _ => None,
            },
        },
    }
}

fn recovery_end(choices: &mut Choices<'_>) -> RecoveryEnd {
    let text = || "so it is".to_owned();
    match choices.byte() % 4 {
        0 => RecoveryEnd::Recovered,
        1 => RecoveryEnd::SuccessorFailed(text()),
        2 => RecoveryEnd::Quarantined,
        _ => RecoveryEnd::OperatorActionNeeded(text()),
    }
}

fn any_event(choices: &mut Choices<'_>) -> Event {
    let text = || "so it is".to_owned();
    let some = |choices: &mut Choices<'_>| choices.bit().then(text);
    let wish = |choices: &mut Choices<'_>| match choices.bit() {
        true => Wish::Recover,
        false => Wish::Terminate,
    };
    match choices.byte() % 26 {
        0 => Event::Healthy,
        1 => Event::Silent(text()),
        2 => Event::Answers,
        3 => Event::Said(some(choices)),
        4 => Event::Load(some(choices)),
        5 | 6 => Event::Failed(failure()),
        7 => Event::ProgramEnded(text()),
        8 => Event::Policy {
            auto_heal: choices.bit(),
        },
        9 => Event::Asked(Request::Recover),
        10 => Event::Asked(Request::Morph),
        11 => Event::Asked(Request::Capture),
        12 => Event::Asked(Request::Terminate {
            force: choices.bit(),
        }),
        13 => Event::Recorded(wish(choices)),
        14 => Event::NotRecorded(wish(choices)),
        15 => Event::BackOffOver,
        16 => Event::Granted,
        17 => Event::SuccessorStarted,
        18 => Event::RecoveryOver(recovery_end(choices)),
        19 => Event::MorphOver(morph_outcome(choices)),
        20 => Event::CaptureOver,
        21 => Event::JobGone,
        22 => Event::Ended,
        23 => Event::SourceLeft,
        24 => Event::Unreturned(text()),
        _ => Event::NotEnded(text()),
    }
}

impl World {
    /// Makes the next event that the engine expects: an answer of the journal, the end of a job, or a grant.
    fn go_on(&mut self, choices: &mut Choices<'_>) {
        if let Some(wish) = self.facts.writing.front().copied() {
            let event = match choices.bit() {
                true => Event::Recorded(wish),
                false => Event::NotRecorded(wish),
            };
            return self.tell(event);
        }
        let event = match self.facts.job {
            Some(Job::Recovery) if choices.bit() => Event::SuccessorStarted,
            Some(Job::Recovery) => Event::RecoveryOver(recovery_end(choices)),
            Some(Job::Morph) => Event::MorphOver(morph_outcome(choices)),
            Some(Job::Capture) => Event::CaptureOver,
            Some(Job::End) if choices.bit() => Event::Ended,
            Some(Job::End) => Event::NotEnded("so it is".to_owned()),
            None if self.facts.queued => Event::Granted,
            None if self.facts.backing_off => Event::BackOffOver,
            None => any_event(choices),
        };
        if self.may_happen(&event) {
            self.tell(event);
        }
    }

    /// Returns true if `event` may occur: answers require a request, and reports require a watch.
    fn may_happen(&self, event: &Event) -> bool {
        let facts = &self.facts;
        match event {
            Event::Healthy
            | Event::Silent(_)
            | Event::Answers
            | Event::Said(_)
            | Event::Load(_)
            | Event::Failed(_)
            | Event::ProgramEnded(_) => facts.watched,
            Event::Recorded(wish) | Event::NotRecorded(wish) => facts.writing.front() == Some(wish),
            Event::BackOffOver => facts.backing_off,
            Event::Granted => facts.queued,
            Event::RecoveryOver(RecoveryEnd::Recovered) => {
                facts.job == Some(Job::Recovery) && facts.watched
            }
            Event::SuccessorStarted | Event::RecoveryOver(_) => facts.job == Some(Job::Recovery),
            Event::MorphOver(_) | Event::SourceLeft => facts.job == Some(Job::Morph),
            Event::JobGone => matches!(facts.job, Some(Job::Recovery | Job::Morph)),
            Event::CaptureOver => facts.job == Some(Job::Capture),
            Event::Ended | Event::NotEnded(_) | Event::Unreturned(_) => facts.job == Some(Job::End),
            Event::Policy { .. } | Event::Asked(_) => true,
        }
    }

    fn tell(&mut self, event: Event) {
        let (before, name) = (self.engine.stage(), event.name());
        let asked = match &event {
            Event::Asked(request) => Some(self.engine.may(*request).is_ok()),
            _ => None,
        };
        self.note(&event);
        let answer = self.engine.handle(event, self.now);
        let after = self.engine.stage();
        let effects = self.collect();
        let accepted = answer == Answer::Accepted;
        assert!(asked.is_none_or(|may| may == accepted), "{before:?} {name}");
        let mut rows = TRANSITIONS.iter().copied().flatten();
        if let Answer::Refused { stage } = answer {
            assert_eq!((stage, after), (before, before), "{name} was refused");
            assert!(effects.is_empty(), "{name} was refused: {effects:?}");
            let always = |row: &Transition| {
                row.state == before.as_str() && row.event == name && row.guard.is_empty()
            };
            assert!(!rows.any(always), "{before:?}: {name} was refused");
        } else {
            let step = (before.as_str(), name, after.as_str());
            assert_row(rows, step.0, step.1, step.2, &effects);
            self.steps.insert(step);
        }
        self.check(name);
    }

    /// Updates the facts with an event.
    fn note(&mut self, event: &Event) {
        let facts = &mut self.facts;
        match event {
            Event::Recorded(wish) => {
                facts.writing.pop_front();
                facts.resting &= *wish != Wish::Recover;
                facts.journal = Some(wish.desired());
                facts.terminating |= *wish == Wish::Terminate;
            }
            Event::NotRecorded(_) => drop(facts.writing.pop_front()),
            Event::Failed(_) => facts.judged = true,
            Event::BackOffOver => facts.backing_off = false,
            Event::Granted => facts.queued = false,
            Event::RecoveryOver(_) | Event::MorphOver(_) | Event::CaptureOver | Event::Ended => {
                facts.job = None;
            }
            // The journal still holds the wish to terminate, so the end is requested again.
            Event::NotEnded(_) => (facts.job, facts.terminating) = (None, false),
            // The journal row is written together with the successor's number.
            Event::SuccessorStarted if !facts.terminating => {
                facts.journal = Some(Desired::Running);
            }
            _ => {}
        }
    }

    /// Checks the invariants.
    fn check(&mut self, event: &str) {
        let (engine, facts) = (&self.engine, &self.facts);
        let stage = engine.stage();
        let job = match stage {
            Stage::Recovering => Some(Job::Recovery),
            Stage::Morphing => Some(Job::Morph),
            Stage::Capturing => Some(Job::Capture),
            Stage::Ending => Some(Job::End),
            _ => None,
        };
        if !facts.stopped {
            assert_eq!(job, facts.job, "{event}: what is under way");
        }
        if stage == Stage::Resting {
            self.facts.resting = true;
        }
        let (engine, facts) = (&self.engine, &self.facts);
        if stage == Stage::Serving {
            assert!(facts.watched, "{event}: it serves unwatched");
            assert!(
                !facts.judged,
                "{event}: it serves, and its failure is forgotten"
            );
        }
        // A frozen generation's silence is not judged, so it must not be the reason shown.
        if stage == Stage::Capturing && engine.condition() == Condition::Unresponsive {
            assert_eq!(
                engine.reason(),
                Some("its memory is being captured"),
                "{event}"
            );
        }
        if facts.terminating {
            assert_eq!(engine.desired(), Desired::Terminating, "{event}");
        }
        // The journal holds every rest, so that it survives a restart.
        if stage == Stage::Resting && facts.writing.is_empty() {
            let noted = facts.journal == Some(engine.desired());
            assert!(noted, "{event}: {:?} {:?}", facts.journal, engine.desired());
        }
    }

    /// Takes all actions, checks each against the rules, and returns their names.
    fn collect(&mut self) -> Vec<&'static str> {
        let mut names = Vec::new();
        while let Some(action) = self.engine.poll_action() {
            self.allowed(&action);
            names.push(action.name());
        }
        assert!(names.len() <= ACTIONS_MAX, "{names:?}");
        names
    }

    fn begin_job(&mut self, job: Job) {
        assert_eq!(self.facts.job, None, "{job:?} begins beside another");
        self.facts.job = Some(job);
    }

    fn allowed(&mut self, action: &Action) {
        assert!(!self.facts.stopped, "{action:?} after the end");
        match action {
            Action::Watch(WatchOrder::Begin | WatchOrder::Adopt) => {
                assert!(!self.facts.watched, "two watches of one generation");
                (self.facts.watched, self.facts.judged) = (true, false);
            }
            Action::Watch(WatchOrder::TakeOver) => {
                (self.facts.watched, self.facts.judged) = (true, false);
            }
            Action::Watch(WatchOrder::End) => self.facts.watched = false,
            Action::Save => {
                assert!(!self.facts.terminating, "its end is written over");
                self.facts.journal = Some(self.engine.desired());
            }
            Action::Record(wish) => {
                assert!(!self.facts.terminating && !self.facts.writing.contains(wish));
                self.facts.writing.push_back(*wish);
            }
            Action::BackOff(_) => self.facts.backing_off = true,
            Action::CancelBackOff => {
                assert!(self.facts.backing_off);
                self.facts.backing_off = false;
            }
            Action::Queue => {
                assert!(!self.facts.resting, "healed although it rests");
                assert!(!self.facts.terminating, "healed although its end is wanted");
                self.facts.queued = true;
            }
            Action::Recover(..) => {
                assert!(!self.facts.terminating, "healed although its end is wanted");
                self.begin_job(Job::Recovery);
            }
            Action::Morph => self.begin_job(Job::Morph),
            Action::Capture => self.begin_job(Job::Capture),
            Action::End(order) => {
                self.facts.terminating |= matches!(order, EndOrder::Asked { .. });
                // The end of a failed spawn is written to the journal first.
                self.facts.journal = Some(Desired::Terminating);
                self.begin_job(Job::End);
            }
            Action::Tell(JobNews::SourceFailed(_) | JobNews::Terminated) => {
                assert_eq!(self.facts.job, Some(Job::Morph));
            }
            Action::Tell(JobNews::SuccessorHealthy | JobNews::SuccessorFailed(_)) => {
                assert_eq!(self.facts.job, Some(Job::Recovery));
            }
            Action::EndRecovery(_) => {
                assert!(
                    self.facts.unfinished,
                    "a recovery ends twice, or none was begun"
                );
                self.facts.unfinished = false;
            }
            Action::Stop => self.facts.stopped = true,
            _ => {}
        }
    }
}
