//! Tests with a second state provider beside `cooperative`: it shows memory to the next kernel, and can also copy it.
//! The tests play the daemon, which chooses as the real one does. Each test names its rule.

use std::sync::MutexGuard;

use async_trait::async_trait;
use kmp_proto::message::{
    Check, CheckResult, MorphRollback, MorphTransfer, MorphTransferFixed, MorphValidate, Reference,
    RollbackFixed, TransferMode, TransferOp, capability, transfer_flags,
};
use kmp_proto::morph::{Choice, Config, Missing, Offer, PassedOver, WhyNot};

use super::transfer::willing;
use super::*;
use crate::provider::{Ability, Export, Exported, Import, Piece, Provider, Providers};

/// A provider that the protocol has no name for.
const KEPT: StateProvider = StateProvider::Other(64);
const SESSION: u64 = 1;
/// The state of the workload at the source.
const STATE: &[u8] = b"state that outlives its kernel";

/// Memory that both kernels can map.
type Shared = Arc<Mutex<Vec<u8>>>;

/// One side of the provider.
#[derive(Debug, Default)]
struct Kept {
    shared: Shared,
    own: Mutex<Vec<u8>>,
    sent: Mutex<bool>,
    /// Every step that was asked for.
    steps: Mutex<Vec<&'static str>>,
    /// The objection to the provider; `never` makes no answer at all.
    why_not: Option<&'static str>,
}

impl Kept {
    fn own(&self) -> MutexGuard<'_, Vec<u8>> {
        self.own.lock().unwrap()
    }

    fn step(&self, step: &'static str) {
        self.steps.lock().unwrap().push(step);
    }

    fn digest(&self) -> u64 {
        self.own().iter().map(|byte| u64::from(*byte)).sum()
    }
}

#[async_trait]
impl Provider for Kept {
    fn id(&self) -> StateProvider {
        KEPT
    }

    async fn offer(&self) -> Result<Ability, String> {
        match self.why_not {
            Some("never") => std::future::pending().await,
            Some(why_not) => Err(why_not.to_owned()),
            None => Ok(Ability {
                memory_bytes: self.own().len() as u64,
                dirty_bytes_per_s: 0,
                state_kinds: capability::MEMORY,
                modes: capability::BY_REFERENCE | capability::ROUNDS,
                state_version: 9,
            }),
        }
    }

    async fn export(&self, export: Export) -> Result<Exported, Refusal> {
        self.step("export");
        let bytes = self.own().len() as u64;
        if export.mode == TransferMode::Rounds {
            return Ok(Exported {
                total_bytes: bytes,
                dirty_bytes: bytes,
                references: Vec::new(),
            });
        }
        *self.shared.lock().unwrap() = self.own().clone();
        let reference = Reference {
            region: 7,
            length: bytes,
            digest: 0,
        };
        Ok(Exported {
            references: vec![reference],
            ..Exported::default()
        })
    }

    async fn read(&self, max_bytes: usize) -> Result<Piece, Refusal> {
        let sent = std::mem::replace(&mut *self.sent.lock().unwrap(), true);
        let data = if sent { Vec::new() } else { self.own().clone() };
        assert!(data.len() <= max_bytes);
        Ok(Piece {
            data,
            ..Piece::default()
        })
    }

    async fn freeze(&self) -> Result<u64, Refusal> {
        self.step("freeze");
        Ok(self.digest())
    }

    async fn resume(&self) -> Result<(), Refusal> {
        self.step("resume");
        Ok(())
    }

    async fn retire(&self) -> Result<(), Refusal> {
        self.step("retire");
        Ok(())
    }

    async fn import(&self, import: Import) -> Result<(), Refusal> {
        self.step("import");
        if import.mode == TransferMode::ByReference {
            let [
                Reference {
                    region: 7, length, ..
                },
            ] = import.references[..]
            else {
                let text = "another reference than the memory's";
                return Err(Refusal::new(ErrorCode::ValidationFailed, text));
            };
            let shared = self.shared.lock().unwrap();
            assert_eq!(length, shared.len() as u64);
            *self.own() = shared.clone();
        }
        Ok(())
    }

    async fn apply(&self, offset: u64, data: Vec<u8>) -> Result<(), Refusal> {
        assert_eq!(offset, 0);
        *self.own() = data;
        Ok(())
    }

    async fn validate(&self) -> Result<Vec<Check>, Refusal> {
        Ok(vec![Check {
            name: "kept memory".to_owned(),
            result: CheckResult::Passed,
            duration_us: 0,
            detail: String::new(),
        }])
    }

    async fn activate(&self, _: u64) -> Result<u64, Refusal> {
        self.step("activate");
        Ok(self.digest())
    }

    async fn serve(&self) -> Result<(), Refusal> {
        self.step("serve");
        Ok(())
    }

    async fn abandon(&self) {
        self.step("abandon");
    }
}

/// An agent whose workload takes part, with the second provider beside it, prepared as one side.
struct OneSide {
    agent: Agent,
    control: Connection,
    kept: Arc<Kept>,
    /// Steps that the workload was asked for.
    asked: Arc<std::sync::atomic::AtomicUsize>,
}

impl OneSide {
    async fn prepared(side: Side, kept: Kept) -> Self {
        let kept = Arc::new(kept);
        let (workload, asked) = willing();
        let host = crate::provider::Host {
            workload: workload.clone(),
            predecessor: None,
        };
        let providers = Providers::of(&host).beside(kept.clone());
        let log = Logger::root(slog::Discard, slog::o!());
        // The workload of the agent is none: only the provider's is asked.
        let morphs = Morphs::with(providers, Workload::none(), 1, log);
        let both = features::MORPHS | features::BY_REFERENCE;
        let agent = Agent::moved_by(morphs, Workload::none(), both);
        let mut control = agent.control().await;
        let (from_generation, to_generation) = match side {
            Side::Source => (1, 2),
            Side::Target => (7, 1),
        };
        let prepare = Message::MorphPrepare(MorphPrepare {
            session: SESSION,
            from_generation,
            to_generation,
            downtime_budget_us: 1,
            phase_timeout_ms: 1,
            side,
        });
        let ready = ask(&mut control, prepare).await;
        assert!(matches!(ready, Message::MorphPrepareReply(_)), "{ready:?}");
        Self {
            agent,
            control,
            kept,
            asked,
        }
    }

    async fn offer(&mut self) -> Offer {
        Offer {
            providers: negotiate(&mut self.control, SESSION).await.offers,
            ..Offer::default()
        }
    }

    async fn commit(&mut self, step: CommitStep) -> u64 {
        let commit = MorphCommit {
            session: SESSION,
            nonce: 1,
            step,
            flags: 0,
        };
        match ask(&mut self.control, Message::MorphCommit(commit)).await {
            Message::MorphCommitReply(reply) => reply.state_digest,
            other => panic!("{step:?}: {other:?}"),
        }
    }

    async fn roll_back(&mut self, side: Side) {
        let rollback = Message::MorphRollback(MorphRollback {
            fixed: RollbackFixed {
                session: SESSION,
                side,
            },
            text: String::new(),
        });
        let answer = ask(&mut self.control, rollback).await;
        assert!(
            matches!(answer, Message::MorphRollbackReply(_)),
            "{answer:?}"
        );
    }

    fn steps(&self) -> Vec<&'static str> {
        self.kept.steps.lock().unwrap().clone()
    }
}

/// Source and target, which see the same memory, and what is against the provider at the target.
async fn sides(why_not: Option<&'static str>) -> (OneSide, OneSide) {
    let shared = Shared::default();
    let source = Kept {
        shared: shared.clone(),
        own: Mutex::new(STATE.to_vec()),
        ..Kept::default()
    };
    let target = Kept {
        shared,
        why_not,
        ..Kept::default()
    };
    (
        OneSide::prepared(Side::Source, source).await,
        OneSide::prepared(Side::Target, target).await,
    )
}

/// The provider that a daemon with this table would choose.
async fn chosen(
    preference: &'static [StateProvider],
    possible_modes: u32,
    source: &mut OneSide,
    target: &mut OneSide,
) -> Choice {
    let config = Config {
        phase_timeout: PATIENCE,
        expiry: PATIENCE,
        downtime_budget: PATIENCE,
        step_overhead: Duration::ZERO,
        preference,
        required_kinds: capability::MEMORY,
        possible_modes,
        validate_on_request: false,
    };
    let (source, target) = (source.offer().await, target.offer().await);
    kmp_proto::morph::negotiate(&config, &source, &target).unwrap()
}

fn pull(provider: StateProvider, mode: TransferMode, round: u32, flags: u32) -> MorphTransfer {
    MorphTransfer {
        fixed: MorphTransferFixed {
            session: SESSION,
            offset: 0,
            total_bytes: STATE.len() as u64,
            dirty_bytes: 0,
            round,
            flags,
            chunk_crc32: 0,
            op: TransferOp::Pull,
            mode,
            provider,
        },
        data: Vec::new(),
        references: Vec::new(),
    }
}

/// One round by reference, as the daemon carries it.
async fn by_reference(provider: StateProvider, source: &mut OneSide, target: &mut OneSide) {
    let mut pull = pull(provider, TransferMode::ByReference, 1, 0);
    for side in [source, target] {
        let asked = Message::MorphTransfer(pull.clone());
        let answer = ask(&mut side.control, asked.clone()).await;
        let expected = kmp_proto::message::Expected::of(&asked).unwrap();
        expected.check(&answer).unwrap();
        let Message::MorphTransferReply(applied) = answer else {
            panic!("{answer:?}");
        };
        // The target receives the source's references.
        pull.references = applied.references;
    }
    assert!(pull.references.is_empty(), "a target names nothing");
}

/// One round in rounds, as the daemon relays it.
async fn relayed(pull: MorphTransfer, source: &mut Connection, target: &mut Connection) {
    let provider = pull.fixed.provider;
    source
        .writer
        .send(&Message::MorphTransfer(pull))
        .await
        .unwrap();
    loop {
        let state = match next_frame(source).await.unwrap() {
            Message::MorphTransfer(state) => state,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            state.fixed.provider, provider,
            "each frame says what carries it"
        );
        let end = state.fixed.op == TransferOp::EndOfRound;
        target
            .writer
            .send(&Message::MorphTransfer(state))
            .await
            .unwrap();
        if end {
            let applied = next_frame(target).await.unwrap();
            assert!(
                matches!(applied, Message::MorphTransferReply(_)),
                "{applied:?}"
            );
            return;
        }
    }
}

#[tokio::test]
async fn the_provider_that_the_daemon_chooses_takes_every_step_on_both_sides_and_no_other_does() {
    const KEPT_FIRST: &[StateProvider] = &[KEPT, StateProvider::Cooperative];
    for (modes, mode) in [
        (capability::BY_REFERENCE, TransferMode::ByReference),
        (capability::ROUNDS, TransferMode::Rounds),
    ] {
        let (mut source, mut target) = sides(None).await;
        let choice = chosen(KEPT_FIRST, modes, &mut source, &mut target).await;
        assert_eq!((choice.provider, choice.mode), (KEPT, mode));
        let less = PassedOver {
            provider: StateProvider::Cooperative,
            why: WhyNot::LessPreferred(KEPT),
        };
        assert_eq!(choice.passed_over, [less]);
        let mut bulk = (
            source.agent.connect(Channel::Bulk).await,
            target.agent.connect(Channel::Bulk).await,
        );
        bulk = match mode {
            TransferMode::ByReference => {
                by_reference(KEPT, &mut source, &mut target).await;
                bulk
            }
            TransferMode::Rounds => {
                relayed(pull(KEPT, mode, 1, 0), &mut bulk.0, &mut bulk.1).await;
                bulk
            }
        };
        let validate = Message::MorphValidate(MorphValidate {
            session: SESSION,
            round: 1,
            flags: 0,
            state_bytes: STATE.len() as u64,
        });
        match ask(&mut target.control, validate).await {
            Message::MorphValidateReply(report) => {
                assert_eq!(report.fixed.verdict, CheckResult::Passed);
                assert_eq!(report.checks[0].name, "kept memory");
            }
            other => panic!("{other:?}"),
        }
        let frozen = source.commit(CommitStep::Freeze).await;
        let last = pull(KEPT, mode, 2, transfer_flags::FINAL);
        match mode {
            TransferMode::ByReference => {
                let last = ask(&mut source.control, Message::MorphTransfer(last)).await;
                assert!(matches!(last, Message::MorphTransferReply(_)), "{last:?}");
            }
            TransferMode::Rounds => relayed(last, &mut bulk.0, &mut bulk.1).await,
        }
        assert_eq!(target.commit(CommitStep::Activate).await, frozen);
        target.commit(CommitStep::Serve).await;
        source.commit(CommitStep::Retire).await;
        assert_eq!(*target.kept.own(), STATE);
        assert_eq!(source.steps(), ["export", "freeze", "retire"]);
        assert_eq!(target.steps(), ["import", "activate", "serve"]);
        for side in [&source, &target] {
            let asked = side.asked.load(Ordering::Relaxed);
            assert_eq!(asked, 0, "the workload heard of a step");
        }
    }
}

#[tokio::test]
async fn a_provider_that_one_side_cannot_use_is_passed_over_with_its_reason() {
    const KEPT_FIRST: &[StateProvider] = &[KEPT, StateProvider::Cooperative];
    let (mut source, mut target) = sides(Some("no memory to map")).await;
    let rounds = capability::ROUNDS;
    let choice = chosen(KEPT_FIRST, rounds, &mut source, &mut target).await;
    assert_eq!(choice.provider, StateProvider::Cooperative);
    let unable = Missing::Unable(Side::Target, "no memory to map".to_owned());
    let kept = PassedOver {
        provider: KEPT,
        why: WhyNot::Impossible(vec![unable]),
    };
    assert_eq!(choice.passed_over, [kept]);
    let mut bulk = (
        source.agent.connect(Channel::Bulk).await,
        target.agent.connect(Channel::Bulk).await,
    );
    let first = pull(choice.provider, TransferMode::Rounds, 1, 0);
    relayed(first, &mut bulk.0, &mut bulk.1).await;
    source.commit(CommitStep::Freeze).await;
    assert_eq!(
        source.asked.load(Ordering::Relaxed),
        1,
        "the workload stands still"
    );
    assert!(source.steps().is_empty() && target.steps().is_empty());
}

#[tokio::test]
async fn a_provider_that_was_not_offered_in_the_session_is_refused_and_nothing_is_touched() {
    let by_reference = TransferMode::ByReference;
    let with = |provider| Message::MorphTransfer(pull(provider, by_reference, 1, 0));
    let (mut source, mut target) = sides(Some("no memory to map")).await;
    // Before the negotiation nothing is offered.
    let early = ask(&mut source.control, with(KEPT)).await;
    assert_eq!(code(&early), ErrorCode::Incompatible);
    let unasked = MorphNegotiate {
        session: SESSION,
        providers: StateProvider::Cooperative.value() | 1 << 31,
    };
    let offers = match ask(&mut source.control, Message::MorphNegotiate(unasked)).await {
        Message::MorphNegotiateReply(reply) => reply.offers,
        other => panic!("{other:?}"),
    };
    let offered: Vec<_> = offers.iter().map(|offer| offer.provider).collect();
    assert_eq!(
        offered,
        [StateProvider::Cooperative],
        "only what was asked for"
    );
    target.offer().await;
    // A provider that was not requested, one that the side refused, and one that it lacks.
    for (side, provider) in [
        (Side::Source, KEPT),
        (Side::Target, KEPT),
        (Side::Target, StateProvider::Other(2)),
    ] {
        let (side, op) = match side {
            Side::Source => (&mut source, TransferOp::Pull),
            Side::Target => (&mut target, TransferOp::EndOfRound),
        };
        let refused = ask(&mut side.control, with(provider)).await;
        assert_eq!(code(&refused), ErrorCode::Incompatible, "{provider}");
        let mut bulk = side.agent.connect(Channel::Bulk).await;
        let mut rounds = pull(provider, TransferMode::Rounds, 1, 0);
        rounds.fixed.op = op;
        let refused = ask(&mut bulk, Message::MorphTransfer(rounds)).await;
        assert_eq!(code(&refused), ErrorCode::Incompatible, "{provider}");
        let end = next_frame(&mut bulk).await;
        assert!(matches!(end, Err(ConnectionError::Closed)), "{end:?}");
    }
    // Without a provider there is no step.
    let freeze = Message::MorphCommit(MorphCommit {
        session: SESSION,
        nonce: 1,
        step: CommitStep::Freeze,
        flags: 0,
    });
    let validate = Message::MorphValidate(MorphValidate {
        session: SESSION,
        round: 1,
        flags: 0,
        state_bytes: 0,
    });
    for (side, step) in [(&mut source, freeze), (&mut target, validate)] {
        let refused = ask(&mut side.control, step).await;
        assert_eq!(code(&refused), ErrorCode::UnexpectedInState);
    }
    // Once one is chosen the session stays with it.
    source.offer().await;
    let answer = ask(&mut source.control, with(KEPT)).await;
    assert!(
        matches!(answer, Message::MorphTransferReply(_)),
        "{answer:?}"
    );
    let changed = ask(&mut source.control, with(StateProvider::Cooperative)).await;
    assert_eq!(code(&changed), ErrorCode::Incompatible);
    assert_eq!(source.steps(), ["export"]);
    assert!(target.steps().is_empty());
    for side in [&source, &target] {
        assert_eq!(side.asked.load(Ordering::Relaxed), 0);
    }
}

#[tokio::test]
async fn a_rollback_is_the_chosen_providers_on_either_side() {
    let (mut source, mut target) = sides(None).await;
    source.offer().await;
    target.offer().await;
    by_reference(KEPT, &mut source, &mut target).await;
    source.commit(CommitStep::Freeze).await;
    target.roll_back(Side::Target).await;
    source.roll_back(Side::Source).await;
    assert_eq!(source.steps(), ["export", "freeze", "resume"]);
    assert_eq!(target.steps(), ["import", "abandon"]);
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_does_not_answer_is_offered_as_one_that_cannot_be_used() {
    let (mut source, _target) = sides(None).await;
    let kept = Kept {
        why_not: Some("never"),
        ..Kept::default()
    };
    let mut silent = OneSide::prepared(Side::Target, kept).await;
    let reasons = |offer: Offer| {
        let reason = |o: &kmp_proto::message::ProviderOffer| (o.provider, o.why_not.clone());
        offer.providers.iter().map(reason).collect::<Vec<_>>()
    };
    let cooperative = (StateProvider::Cooperative, String::new());
    let no_answer = (KEPT, "no answer within 5 s".to_owned());
    assert_eq!(
        reasons(silent.offer().await),
        [cooperative.clone(), no_answer]
    );
    let possible = (KEPT, String::new());
    assert_eq!(reasons(source.offer().await), [cooperative, possible]);
}
