//! The morph engine under any events.

use std::collections::VecDeque;
use std::time::Duration;

use kmp_proto::message::{Check, CheckResult, ProviderOffer, Side, StateProvider, capability};
use kmp_proto::morph::{
    Action, Answer, CommitLimit, CommitRecord, Config, Engine, Event, Offer, Outcome, Stage,
    TRANSITIONS,
};
use kmp_proto::time::Instant;
use kmp_proto::transition::Transition;

use super::{Choices, assert_row, assert_taken, certify};

const SOURCE: u64 = 7;
const TARGET: u64 = 8;
/// A provider without a name in this version, which this daemon prefers.
const OTHER: StateProvider = StateProvider::Other(64);
/// Maximum number of actions that one event causes.
const ACTIONS_MAX: usize = 4;
/// States that wait for the journal or a backend, which bound their own work.
const WITHOUT_DEADLINE: [Stage; 3] = [Stage::Recording, Stage::FencingSource, Stage::FencingTarget];

/// Facts so far, derived from the events and the actions.
#[derive(Debug, Default)]
struct Facts {
    target_healthy: bool,
    /// Providers that each side can use, by its last offer in the negotiation.
    source_offers: Vec<StateProvider>,
    target_offers: Vec<StateProvider>,
    chosen: Option<StateProvider>,
    validated: bool,
    frozen: bool,
    record_ordered: bool,
    durable: bool,
    target_fenced: bool,
    source_fenced: bool,
    served: bool,
    resumed: bool,
    finished: Option<Outcome>,
}

struct World {
    engine: Engine,
    now: Instant,
    /// Actions that are not answered yet.
    open: VecDeque<Action>,
    facts: Facts,
}

fn config(validate_on_request: bool) -> Config {
    Config {
        phase_timeout: Duration::from_secs(60),
        expiry: Duration::from_secs(600),
        downtime_budget: Duration::from_millis(10),
        step_overhead: Duration::from_millis(2),
        preference: &[OTHER, StateProvider::Cooperative],
        required_kinds: capability::MEMORY,
        possible_modes: capability::BY_REFERENCE | capability::ROUNDS,
        validate_on_request,
    }
}

/// Drives an engine through the events that `bytes` encode.
///
/// # Panics
/// If a rule is broken.
pub fn run(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let now = Instant::default();
    let mut world = World {
        engine: Engine::new(config(choices.bit()), SOURCE, TARGET, now),
        now,
        open: VecDeque::new(),
        facts: Facts::default(),
    };
    world.collect();
    while let Some(choice) = choices.next() {
        match choice {
            0..160 => world.answer(&mut choices),
            160..176 => world.restart(choices.bit()),
            176..192 => world.advance(choices.byte()),
            192.. => {
                let event = any_event(&mut choices);
                world.tell(event);
            }
        }
    }
}

fn side(choices: &mut Choices<'_>) -> Side {
    if choices.bit() {
        Side::Target
    } else {
        Side::Source
    }
}

/// Returns an offer. Bits 0 and 1 are the modes, bit 2 adds another provider, which the side cannot use if bit 3 is
/// set, and bit 4 removes the workload's own provider.
fn offer(bits: u8) -> Offer {
    let of = |provider, why_not: &str| ProviderOffer {
        provider,
        memory_bytes: 0,
        dirty_bytes_per_s: 0,
        state_kinds: capability::MEMORY,
        modes: u32::from(bits & 3),
        state_version: 1,
        why_not: why_not.to_owned(),
    };
    let mut providers = Vec::new();
    if bits & 16 == 0 {
        providers.push(of(StateProvider::Cooperative, ""));
    }
    if bits & 4 != 0 {
        providers.push(of(OTHER, if bits & 8 == 0 { "" } else { "no room" }));
    }
    Offer {
        providers,
        ..Offer::default()
    }
}

fn report(results: u8) -> Vec<Check> {
    let check = |bit: u8| Check {
        name: "index".to_owned(),
        result: if results & (1 << bit) == 0 {
            CheckResult::Passed
        } else {
            CheckResult::Failed
        },
        duration_us: 1,
        detail: String::new(),
    };
    (0..results >> 6).map(check).collect()
}

fn round(choices: &mut Choices<'_>) -> Event {
    Event::RoundApplied {
        sent_bytes: u64::from(choices.byte()) << 20,
        dirty_bytes: u64::from(choices.byte()) << 16,
        took: Duration::from_millis(u64::from(choices.byte())),
    }
}

fn any_event(choices: &mut Choices<'_>) -> Event {
    let text = || "so it is".to_owned();
    match choices.byte() % 23 {
        0 => Event::TargetHealthy,
        1 => Event::Prepared(side(choices)),
        2 => Event::Offered(side(choices), offer(choices.byte())),
        3 => round(choices),
        4 => Event::ValidationRequested,
        5 => Event::Report(report(choices.byte())),
        6 => Event::CommitRequested {
            limit: match choices.byte() % 3 {
                0 => CommitLimit::Planned,
                1 => CommitLimit::Within(Duration::from_millis(choices.byte().into())),
                _ => CommitLimit::None,
            },
            or_roll_back: choices.bit(),
        },
        7 => Event::RollbackRequested(text()),
        8 => Event::Frozen(u64::from(choices.byte())),
        9 => Event::Activated(u64::from(choices.byte())),
        10 => Event::Serving,
        11 => Event::Retired,
        12 => Event::Fenced(
            side(choices),
            certify(if choices.bit() { TARGET } else { SOURCE }),
        ),
        13 => Event::FenceUnconfirmed(side(choices), text()),
        14 => Event::SourceRunning,
        15 => Event::Refused(side(choices), text()),
        16 => Event::Died(side(choices), text()),
        17 => Event::RecordFailed(text()),
        18 => {
            let target = if choices.bit() { TARGET } else { TARGET + 1 };
            Event::RecordDurable(CommitRecord::restore_from_journal(SOURCE, target))
        }
        19 => Event::Unanswered(side(choices), text()),
        20 => Event::NotStarted(text()),
        _ => Event::Tick,
    }
}

impl World {
    /// Answers the oldest open action as a fault-free world would; without an open action, time advances.
    fn answer(&mut self, choices: &mut Choices<'_>) {
        let Some(action) = self.open.pop_front() else {
            let due = self.engine.poll_timeout();
            self.now = self.now.max(due.unwrap_or(self.now));
            return self.tell(Event::Tick);
        };
        match action {
            Action::Prepare(Side::Source) => {
                self.tell(Event::Prepared(Side::Source));
                self.tell(Event::TargetHealthy);
            }
            Action::Prepare(side) => self.tell(Event::Prepared(side)),
            Action::Negotiate(side) => self.tell(Event::Offered(side, offer(3))),
            Action::Round { .. } => {
                let event = round(choices);
                self.tell(event);
            }
            Action::Validate => self.tell(Event::Report(report(1 << 6))),
            Action::Transferred => self.tell(Event::ValidationRequested),
            Action::Committable(_) => self.tell(Event::CommitRequested {
                limit: CommitLimit::None,
                or_roll_back: false,
            }),
            Action::Freeze => self.tell(Event::Frozen(5)),
            Action::Activate => self.tell(Event::Activated(5)),
            Action::WriteCommitRecord(order) => self.tell(Event::RecordDurable(order.recorded())),
            Action::Serve(_) => self.tell(Event::Serving),
            Action::Retire => self.tell(Event::Retired),
            Action::Fence(side, order) => {
                let certificate = certify(order.generation());
                self.tell(Event::Fenced(side, certificate));
            }
            Action::ResumeSource(_) => self.tell(Event::SourceRunning),
            Action::Chosen(_)
            | Action::CommitRefused(_)
            | Action::Phase(_)
            | Action::Finished(_) => {}
        }
    }

    /// The daemon dies and restarts; `written` states whether a record in progress became durable.
    fn restart(&mut self, written: bool) {
        if self.facts.finished.is_some() {
            return;
        }
        let writing = self.engine.stage() == Stage::Recording;
        self.facts.durable |= writing && written;
        self.engine = match self.facts.durable {
            true => {
                let record = CommitRecord::restore_from_journal(SOURCE, TARGET);
                Engine::resume_committed(record, self.now)
            }
            false => Engine::resume_uncommitted(SOURCE, TARGET),
        };
        self.open.clear();
        let effects = self.collect();
        let rows = TRANSITIONS.iter().copied().flatten();
        assert_row(rows, "–", "resume", self.engine.stage().as_str(), &effects);
    }

    fn advance(&mut self, seconds: u8) {
        self.now = self.now + Duration::from_secs(u64::from(seconds));
    }

    fn tell(&mut self, event: Event) {
        let (before, name) = (self.engine.stage(), event.name());
        let ticked = matches!(event, Event::Tick);
        self.note(&event);
        let answer = self.engine.handle(event, self.now);
        let effects = self.collect();
        let after = self.engine.stage();
        let mut rows = TRANSITIONS.iter().copied().flatten();
        if let Answer::Refused { stage } = answer {
            assert_eq!((stage, after), (before, before), "{name} was refused");
            assert!(effects.is_empty(), "{name} was refused: {effects:?}");
            let always = |row: &Transition| {
                row.state == before.as_str() && row.event == name && row.guard.is_empty()
            };
            assert!(!rows.any(always), "{before:?}: {name} was refused");
        } else {
            assert_taken(rows, before.as_str(), name, after.as_str(), &effects);
        }
        let due = self.engine.poll_timeout();
        if ticked {
            assert!(due.is_none_or(|due| due > self.now), "{after:?}: due again");
        }
        if self.facts.finished.is_some() {
            assert_eq!((after, due), (Stage::Done, None));
        } else if !WITHOUT_DEADLINE.contains(&after) {
            assert!(due.is_some(), "{after:?} waits for ever");
        }
    }

    /// Updates the facts with an event, if the engine is in a state in which the event counts.
    fn note(&mut self, event: &Event) {
        let facts = &mut self.facts;
        let stage = self.engine.stage();
        match event {
            Event::TargetHealthy => facts.target_healthy = true,
            Event::Offered(side, offer) if stage == Stage::Negotiating => {
                let possible = offer.providers.iter().filter(|o| o.is_possible());
                let possible = possible.map(|o| o.provider).collect();
                match side {
                    Side::Source => facts.source_offers = possible,
                    Side::Target => facts.target_offers = possible,
                }
            }
            Event::Report(checks) if stage == Stage::Validating => {
                let passed = |check: &Check| check.result == CheckResult::Passed;
                facts.validated = !checks.is_empty() && checks.iter().all(passed);
            }
            Event::Frozen(_) if stage == Stage::Freezing => facts.frozen = true,
            Event::RecordDurable(record) if stage == Stage::Recording => {
                facts.durable |= record.target() == TARGET;
            }
            Event::Fenced(Side::Target, proof) => {
                facts.target_fenced |= proof.generation() == TARGET
            }
            Event::Fenced(Side::Source, proof) => {
                facts.source_fenced |= proof.generation() == SOURCE
            }
            _ => {}
        }
    }

    /// Takes all actions, checks each against the rules, and returns their names.
    fn collect(&mut self) -> Vec<&'static str> {
        let mut names = Vec::new();
        while let Some(action) = self.engine.poll_action() {
            self.allowed(&action);
            names.push(action.name());
            self.open.push_back(action);
        }
        assert!(names.len() <= ACTIONS_MAX, "{names:?}");
        names
    }

    fn allowed(&mut self, action: &Action) {
        let facts = &mut self.facts;
        assert!(facts.finished.is_none(), "{action:?} after the end");
        match action {
            Action::Negotiate(_) => assert!(facts.target_healthy, "the target is not up"),
            Action::Chosen(choice) => {
                let offered = |by: &[StateProvider]| by.contains(&choice.provider);
                assert!(offered(&facts.source_offers) && offered(&facts.target_offers));
                assert_eq!(facts.chosen.replace(choice.provider), None, "chosen twice");
            }
            Action::Round { provider, .. } => assert_eq!(facts.chosen, Some(*provider)),
            Action::Freeze => assert!(facts.validated, "freezes what is not validated"),
            Action::WriteCommitRecord(_) => {
                assert!(facts.validated && facts.frozen, "{facts:?}");
                assert!(!facts.record_ordered, "the record is written twice");
                facts.record_ordered = true;
            }
            Action::Serve(record) => {
                assert_eq!(record.target(), TARGET);
                assert!(facts.durable && !facts.resumed, "{facts:?}");
                facts.served = true;
            }
            Action::ResumeSource(proof) => {
                assert_eq!(proof.generation(), TARGET);
                assert!(facts.target_fenced && !facts.durable, "{facts:?}");
                assert!(!facts.served, "both sides serve");
                facts.resumed = true;
            }
            Action::Retire => assert!(facts.durable, "{facts:?}"),
            Action::Fence(Side::Source, order) => {
                assert!(facts.durable && order.generation() == SOURCE, "{facts:?}");
            }
            Action::Fence(Side::Target, order) => {
                assert!(!facts.durable && order.generation() == TARGET, "{facts:?}");
            }
            Action::Finished(outcome) => {
                let proven = match outcome {
                    Outcome::Committed => facts.durable && facts.source_fenced && facts.served,
                    Outcome::CommittedButFailed(_) => facts.durable && facts.source_fenced,
                    Outcome::RolledBack(_) => facts.target_fenced && facts.resumed,
                    Outcome::SourceFailed { .. } => facts.target_fenced && !facts.durable,
                    Outcome::OperatorActionNeeded { .. } => true,
                };
                assert!(proven, "{outcome:?} with {facts:?}");
                let committed = outcome.owner() == Side::Target;
                assert_eq!(committed, facts.durable, "{outcome:?}");
                facts.finished = Some(outcome.clone());
            }
            _ => {}
        }
    }
}
