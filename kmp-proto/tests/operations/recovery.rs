//! The recovery engine and the restart policy under any events.

use std::time::Duration;

use kmp_proto::fence::FenceCertificate;
use kmp_proto::recovery::{
    Action, Afterwards, BACK_OFF_MAX, CRASH_LOOP_FAILURES, CRASH_LOOP_WINDOW, CapturePolicy,
    Decision, Engine, Event, FENCE_ATTEMPTS, Outcome, RestartPolicy, TRANSITIONS,
};
use kmp_proto::time::Instant;

use super::{Choices, assert_row, certify};

const FAILED: u64 = 7;
/// Maximum number of actions that one event causes.
const ACTIONS_MAX: usize = 2;

/// Facts so far.
#[derive(Debug, Default)]
struct Facts {
    certificate: Option<FenceCertificate>,
    orders: u32,
    capturing: bool,
    captured: bool,
    capture_failed: bool,
    reclaimed: bool,
    released: bool,
    respawned: bool,
    unwanted: bool,
    started: bool,
    successor: Option<u64>,
    finished: bool,
}

struct World {
    policy: CapturePolicy,
    afterwards: Afterwards,
    now: Instant,
    engine: Engine,
    facts: Facts,
}

/// Drives an engine through the events that `bytes` encode.
///
/// # Panics
/// If a rule is broken.
pub fn run(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let policy = policy(choices.byte());
    let afterwards = match choices.bit() {
        true => Afterwards::Respawn,
        false => Afterwards::Quarantine,
    };
    let mut world = World {
        policy,
        afterwards,
        now: Instant::default(),
        engine: Engine::new(FAILED, policy, afterwards),
        facts: Facts::default(),
    };
    world.collect();
    let mut restarts = RestartPolicy::new();
    let (mut now, mut failures) = (Instant::default(), Vec::new());
    while let Some(choice) = choices.next() {
        match choice {
            0..192 => {
                let event = any_event(choice, &mut choices);
                world.tell(event);
            }
            192..208 => world.restart(),
            _ => {
                now = now + Duration::from_millis(u64::from(choices.byte()) << (choice & 7));
                restart(&mut restarts, choice, now, &mut failures);
            }
        }
    }
}

fn policy(choice: u8) -> CapturePolicy {
    match choice % 3 {
        0 => CapturePolicy::Off,
        1 => CapturePolicy::On,
        _ => CapturePolicy::Required,
    }
}

fn any_event(choice: u8, choices: &mut Choices<'_>) -> Event {
    match choice % 12 {
        0 => Event::Fenced(certify(FAILED)),
        1 => Event::Fenced(certify(u64::from(choices.byte()))),
        2 => Event::FenceUnconfirmed("it still runs".to_owned()),
        3 => Event::Released,
        4 => Event::SuccessorHealthy {
            generation: u64::from(choices.byte() % 10),
        },
        5 => Event::Captured,
        6 => Event::CaptureFailed("the disk is full".to_owned()),
        7 => Event::SuccessorFailed("it does not start".to_owned()),
        9 => Event::SuccessorStarted,
        10 => Event::NotStarted("it does not start".to_owned()),
        8 => Event::SuccessorRemains("it may run".to_owned()),
        _ => Event::Tick,
    }
}

impl World {
    /// The daemon dies and restarts, with the certificate if one was recorded.
    fn restart(&mut self) {
        if self.facts.finished {
            return;
        }
        let (event, certificate) = match self.facts.certificate.clone() {
            Some(certificate) => ("resume", Some(certificate)),
            None => ("begin", None),
        };
        self.facts = Facts::default();
        self.facts.certificate.clone_from(&certificate);
        self.engine = match certificate {
            Some(certificate) => Engine::resume_fenced(certificate, self.policy, self.afterwards),
            None => Engine::new(FAILED, self.policy, self.afterwards),
        };
        let effects = self.collect();
        let next = self.engine.phase();
        assert_row(TRANSITIONS.iter(), "–", event, next, &effects);
    }

    fn tell(&mut self, event: Event) {
        let (before, name) = (self.engine.phase(), event.name());
        match &event {
            Event::Fenced(proof)
                if before == "preparing_recovery" && proof.generation() == FAILED =>
            {
                self.facts.certificate = Some(proof.clone());
            }
            Event::Captured => self.facts.captured |= before == "capturing_vmcore",
            Event::CaptureFailed(_) => {
                self.facts.capture_failed |= before == "capturing_vmcore";
            }
            Event::Released => self.facts.released |= before == "reclaiming_resources",
            Event::SuccessorFailed(_) => self.facts.unwanted = true,
            Event::SuccessorStarted if before == "respawning" => self.facts.started = true,
            Event::SuccessorHealthy { generation } if before == "respawning" => {
                self.facts.successor = Some(*generation);
            }
            _ => {}
        }
        if matches!(event, Event::Tick) {
            self.now = self.engine.poll_timeout().unwrap_or(self.now);
        }
        self.engine.handle(event, self.now);
        let effects = self.collect();
        let after = self.engine.phase();
        assert_row(TRANSITIONS.iter(), before, name, after, &effects);
        assert_eq!(self.facts.finished, after == "done");
    }

    fn collect(&mut self) -> Vec<&'static str> {
        let mut names = Vec::new();
        while let Some(action) = self.engine.poll_action() {
            self.allowed(&action);
            names.push(action.name());
        }
        assert!(names.len() <= ACTIONS_MAX, "{names:?}");
        names
    }

    fn allowed(&mut self, action: &Action) {
        let facts = &mut self.facts;
        assert!(!facts.finished, "{action:?} after the end");
        match action {
            Action::NoticeSurvivors => {}
            Action::Fence(order) => {
                assert_eq!(order.generation(), FAILED);
                assert!(facts.certificate.is_none(), "fenced twice");
                facts.orders += 1;
                assert!(facts.orders <= FENCE_ATTEMPTS);
            }
            Action::Capture(proof) => {
                assert_eq!(Some(proof), facts.certificate.as_ref());
                assert_ne!(self.policy, CapturePolicy::Off);
                assert!(!facts.reclaimed && !std::mem::replace(&mut facts.capturing, true));
            }
            Action::Reclaim(proof) => {
                assert_eq!(Some(proof), facts.certificate.as_ref());
                assert!(match self.policy {
                    CapturePolicy::Off => !facts.capturing,
                    CapturePolicy::On => facts.captured || facts.capture_failed,
                    CapturePolicy::Required => facts.captured,
                });
                assert!(!std::mem::replace(&mut facts.reclaimed, true));
            }
            Action::Respawn(proof) => {
                assert_eq!(Some(proof), facts.certificate.as_ref());
                assert!(facts.reclaimed && facts.released, "{facts:?}");
                assert_eq!(self.afterwards, Afterwards::Respawn);
                assert!(!facts.unwanted, "nobody wants it");
                assert!(!std::mem::replace(&mut facts.respawned, true));
            }
            Action::Complete { new_generation } => {
                assert!(facts.released, "{facts:?}");
                assert!(*new_generation == 0 || *new_generation > FAILED);
            }
            Action::Finished(outcome) => {
                match outcome {
                    Outcome::Recovered => {
                        assert!(facts.respawned && facts.started);
                        assert!(facts.successor.is_some_and(|next| next > FAILED));
                    }
                    Outcome::SuccessorFailed(_) => {
                        assert!(facts.released && (facts.respawned || facts.unwanted));
                    }
                    Outcome::Quarantined => {
                        assert!(facts.released && self.afterwards == Afterwards::Quarantine);
                    }
                    Outcome::OperatorActionNeeded(_) if facts.respawned => {}
                    Outcome::OperatorActionNeeded(_) if facts.capture_failed => {
                        assert_eq!(self.policy, CapturePolicy::Required);
                        assert!(!facts.reclaimed);
                    }
                    Outcome::OperatorActionNeeded(_) => {
                        assert!(facts.certificate.is_none(), "{facts:?}");
                        assert_eq!(facts.orders, FENCE_ATTEMPTS);
                    }
                }
                facts.finished = true;
            }
        }
    }
}

/// Makes one step of the restart policy, and checks it against the failures of the window, counted separately.
fn restart(policy: &mut RestartPolicy, choice: u8, now: Instant, failures: &mut Vec<Instant>) {
    match choice % 8 {
        0 => {
            policy.forgive();
            failures.clear();
        }
        1 | 2 => policy.healthy(now),
        _ => {
            failures.push(now);
            let recent = |at: &&Instant| now - **at <= CRASH_LOOP_WINDOW;
            let most = failures.iter().filter(recent).count();
            match policy.failed(now) {
                Decision::RecoverAfter(wait) => assert!(wait <= BACK_OFF_MAX),
                Decision::Quarantine { failures } => {
                    assert!((CRASH_LOOP_FAILURES..=most).contains(&failures));
                }
            }
        }
    }
}
