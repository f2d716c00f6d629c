//! Rules of `docs/kmp.md` for the agent's side of a morph: state in rounds and by reference, repeated steps, and
//! refusals once the target serves. The tests play the workload. Each test names its rule.

use std::sync::atomic::AtomicUsize;

use kmorph_workload::handover::message::{Phase, Reply, Request, StateDigest, Status};
use kmp_proto::message::{
    CommitReply, MorphRollback, MorphTransfer, MorphTransferFixed, RollbackFixed, RollbackStatus,
    STATE_CHUNK_MAX_BYTES, StepStatus, TransferMode, TransferOp, transfer_flags,
};

use super::*;

const SESSION: u64 = 1;
const TOTAL: u64 = 1 << 20;
const DIGEST: StateDigest = StateDigest {
    digest: 5,
    counter: 0,
    used_bytes: 0,
};

/// The status of a movable workload.
const STATUS: Reply = Reply::Status(Status {
    phase: Phase::Serving,
    state_bytes: TOTAL,
    used_bytes: 0,
    dirty_bytes_per_s: 0,
    connections: 0,
    items: 0,
    requests: 0,
    state_kinds: 15,
    modes: 3,
});

/// A workload that does whatever it is asked, and how often it was asked to begin or end something.
pub(super) fn willing() -> (Workload, Arc<AtomicUsize>) {
    let steps = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&steps);
    let workload = Workload::played(move |request| {
        let step = matches!(
            request,
            Request::Freeze
                | Request::Activate { .. }
                | Request::Serve
                | Request::Retire
                | Request::Resume
        );
        counted.fetch_add(usize::from(step), Ordering::Relaxed);
        let reply = match request {
            Request::Query => STATUS,
            Request::Freeze => Reply::Frozen {
                state: DIGEST,
                dirty_bytes: 0,
                connections: 0,
                elapsed_us: 0,
            },
            Request::PrepareExport { .. } => Reply::Prepared {
                total_len: TOTAL,
                dirty_bytes: 0,
            },
            Request::PrepareImport { .. } => Reply::ImportReady {
                prefaulted_bytes: 0,
            },
            Request::ReadDirty { .. } => Reply::Chunk {
                section: 0,
                offset: 0,
                dirty_bytes: 0,
            },
            Request::Apply { .. } => Reply::Applied,
            Request::Activate { nonce, .. } => Reply::Activated {
                nonce: *nonce,
                state: DIGEST,
                connections: 0,
            },
            Request::Serve => Reply::Serving { elapsed_us: 0 },
            Request::Retire => Reply::Retired,
            _ => Reply::Resumed,
        };
        (reply, Vec::new())
    });
    (workload, steps)
}

async fn prepared(side: Side) -> (Agent, Connection, Arc<AtomicUsize>) {
    let (workload, steps) = willing();
    let both = features::MORPHS | features::BY_REFERENCE;
    let agent = Agent::with(workload, both);
    let mut control = agent.control().await;
    let (from_generation, to_generation) = match side {
        Side::Source => (1, 2),
        Side::Target => (7, 1),
    };
    let prepare = MorphPrepare {
        session: SESSION,
        from_generation,
        to_generation,
        downtime_budget_us: 1,
        phase_timeout_ms: 1,
        side,
    };
    let ready = ask(&mut control, Message::MorphPrepare(prepare)).await;
    assert!(matches!(ready, Message::MorphPrepareReply(_)), "{ready:?}");
    assert_eq!(negotiate(&mut control, SESSION).await.offers.len(), 1);
    (agent, control, steps)
}

/// As [`prepared`], and the provider is chosen: the first round is through.
async fn begun(side: Side) -> (Agent, Connection, Arc<AtomicUsize>) {
    let (agent, control, steps) = prepared(side).await;
    let mut bulk = agent.connect(Channel::Bulk).await;
    let first = match side {
        Side::Source => frame(TransferOp::Pull, 1, Vec::new()),
        Side::Target => frame(TransferOp::EndOfRound, 1, Vec::new()),
    };
    let through = ask(&mut bulk, Message::MorphTransfer(first)).await;
    let (Message::MorphTransfer(end) | Message::MorphTransferReply(end)) = through else {
        panic!("{through:?}");
    };
    assert!(matches!(
        end.fixed.op,
        TransferOp::EndOfRound | TransferOp::Applied
    ));
    (agent, control, steps)
}

fn frame(op: TransferOp, round: u32, data: Vec<u8>) -> MorphTransfer {
    let fixed = MorphTransferFixed {
        session: SESSION,
        offset: 0,
        total_bytes: TOTAL,
        dirty_bytes: 0,
        round,
        flags: 0,
        chunk_crc32: 0,
        op,
        mode: TransferMode::Rounds,
        provider: StateProvider::Cooperative,
    };
    match op {
        TransferOp::Chunk => MorphTransfer::chunk(fixed, data),
        _ => MorphTransfer {
            fixed,
            data,
            references: Vec::new(),
        },
    }
}

fn chunk(round: u32, bytes: usize) -> MorphTransfer {
    frame(TransferOp::Chunk, round, vec![7; bytes])
}

/// Changes a frame.
type Change = fn(&mut MorphTransfer);

#[tokio::test]
async fn the_new_side_refuses_what_breaks_a_rule_of_a_transfer_and_closes() {
    let broken = |change: Change| {
        let mut frame = chunk(1, 100);
        change(&mut frame);
        frame
    };
    let whole = usize::try_from(TOTAL).unwrap() / STATE_CHUNK_MAX_BYTES;
    let (failed, too_large) = (ErrorCode::ValidationFailed, ErrorCode::TooLarge);
    for (what, good, bad, code) in [
        ("a damaged chunk", 1, broken(|f| f.data[3] ^= 1), failed),
        (
            "another session",
            1,
            broken(|f| f.fixed.session = 99),
            failed,
        ),
        ("another round", 1, broken(|f| f.fixed.round = 2), failed),
        (
            "another mode",
            1,
            broken(|f| f.fixed.mode = TransferMode::ByReference),
            failed,
        ),
        (
            "another provider",
            1,
            broken(|f| f.fixed.provider = StateProvider::Other(64)),
            failed,
        ),
        (
            "another total",
            1,
            broken(|f| f.fixed.total_bytes += 1),
            failed,
        ),
        (
            "too large a chunk",
            1,
            chunk(1, STATE_CHUNK_MAX_BYTES + 1),
            too_large,
        ),
        ("too much in a round", whole + 1, chunk(1, 1), too_large),
    ] {
        let (agent, _control, _) = prepared(Side::Target).await;
        let mut bulk = agent.connect(Channel::Bulk).await;
        for _ in 0..good {
            let sound = Message::MorphTransfer(chunk(1, STATE_CHUNK_MAX_BYTES));
            bulk.writer.send(&sound).await.unwrap();
        }
        let answer = ask(&mut bulk, Message::MorphTransfer(bad)).await;
        assert_eq!(super::code(&answer), code, "{what}");
        let end = next_frame(&mut bulk).await;
        assert!(
            matches!(end, Err(ConnectionError::Closed)),
            "{what}: {end:?}"
        );
    }
}

#[tokio::test]
async fn state_for_a_side_that_is_not_the_new_one_is_refused_and_ends_the_channel() {
    let (old, _control, _) = prepared(Side::Source).await;
    let nobody = Agent::start();
    for agent in [old, nobody] {
        for state in [chunk(1, 1), frame(TransferOp::EndOfRound, 1, Vec::new())] {
            let mut bulk = agent.connect(Channel::Bulk).await;
            let answer = ask(&mut bulk, Message::MorphTransfer(state)).await;
            assert_eq!(code(&answer), ErrorCode::ValidationFailed);
            let end = next_frame(&mut bulk).await;
            assert!(matches!(end, Err(ConnectionError::Closed)), "{end:?}");
        }
    }
}

#[tokio::test]
async fn state_that_the_workload_does_not_take_ends_the_channel() {
    let unwilling = Workload::played(|request| {
        let reply = match request {
            Request::Query => STATUS,
            Request::PrepareImport { .. } => Reply::ImportReady {
                prefaulted_bytes: 0,
            },
            _ => Reply::Retired,
        };
        (reply, Vec::new())
    });
    for (workload, refused) in [
        (unwilling, ErrorCode::Internal),
        (Workload::none(), ErrorCode::ValidationFailed),
    ] {
        let agent = Agent::with(workload, features::MORPHS);
        let mut control = agent.control().await;
        let Message::MorphPrepare(mut prepare) = super::prepare(SESSION, 7) else {
            panic!("another message");
        };
        (prepare.side, prepare.to_generation) = (Side::Target, 1);
        ask(&mut control, Message::MorphPrepare(prepare)).await;
        negotiate(&mut control, SESSION).await;
        let mut bulk = agent.connect(Channel::Bulk).await;
        let answer = ask(&mut bulk, Message::MorphTransfer(chunk(1, 1))).await;
        assert_eq!(code(&answer), refused);
        assert!(next_frame(&mut bulk).await.is_err());
    }
}

#[tokio::test]
async fn a_round_that_is_complete_is_applied_and_the_next_one_begins() {
    let (agent, _control, _) = prepared(Side::Target).await;
    let mut bulk = agent.connect(Channel::Bulk).await;
    for round in 1..=3 {
        let state = Message::MorphTransfer(chunk(round, 10));
        bulk.writer.send(&state).await.unwrap();
        let end = Message::MorphTransfer(frame(TransferOp::EndOfRound, round, Vec::new()));
        let sequence = bulk.writer.send(&end).await.unwrap();
        let applied = tokio::time::timeout(PATIENCE, bulk.reader.next()).await;
        let applied = applied.unwrap().unwrap();
        assert_eq!(applied.header.sequence, sequence);
        let expected = kmp_proto::message::Expected::of(&end).unwrap();
        expected.check(&applied.message).unwrap();
    }
}

#[tokio::test]
async fn a_pull_for_another_session_or_of_a_side_that_is_not_old_is_refused_and_the_channel_goes_on()
 {
    let pull = |session| {
        let mut pull = frame(TransferOp::Pull, 1, Vec::new());
        pull.fixed.session = session;
        Message::MorphTransfer(pull)
    };
    let (old, _held, _) = prepared(Side::Source).await;
    let mut bulk = old.connect(Channel::Bulk).await;
    for _ in 0..2 {
        let answer = ask(&mut bulk, pull(99)).await;
        assert_eq!(code(&answer), ErrorCode::UnexpectedInState);
    }
    let served = ask(&mut bulk, pull(SESSION)).await;
    let Message::MorphTransfer(end) = served else {
        panic!("{served:?}");
    };
    assert_eq!(end.fixed.op, TransferOp::EndOfRound);
    assert_eq!(end.fixed.total_bytes, TOTAL, "announced in the first frame");
    let (new, _held, _) = prepared(Side::Target).await;
    let mut bulk = new.connect(Channel::Bulk).await;
    for _ in 0..2 {
        let answer = ask(&mut bulk, pull(SESSION)).await;
        assert_eq!(code(&answer), ErrorCode::UnexpectedInState);
    }
    bulk.writer
        .send(&Message::MorphTransfer(chunk(1, 1)))
        .await
        .unwrap();
    let end = frame(TransferOp::EndOfRound, 1, Vec::new());
    let applied = ask(&mut bulk, Message::MorphTransfer(end)).await;
    assert!(
        matches!(applied, Message::MorphTransferReply(_)),
        "{applied:?}"
    );
}

/// A workload that writes as fast as it is read, until it is frozen; then so many chunks are left.
fn writing(left_when_frozen: usize) -> Workload {
    let left = AtomicUsize::new(usize::MAX);
    Workload::played(move |request| match request {
        Request::Query => (STATUS, Vec::new()),
        Request::Freeze => {
            left.store(left_when_frozen, Ordering::Relaxed);
            let reply = Reply::Frozen {
                state: DIGEST,
                dirty_bytes: 0,
                connections: 0,
                elapsed_us: 0,
            };
            (reply, Vec::new())
        }
        Request::ReadDirty { .. } => {
            let more =
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            let reply = Reply::Chunk {
                section: 3,
                offset: 5,
                dirty_bytes: 150_000,
            };
            (
                reply,
                more.map_or(Vec::new(), |_| vec![7; STATE_CHUNK_MAX_BYTES]),
            )
        }
        _ => {
            let reply = Reply::Prepared {
                total_len: TOTAL,
                dirty_bytes: 150_000,
            };
            (reply, Vec::new())
        }
    })
}

#[tokio::test]
async fn a_round_has_the_bytes_that_were_dirty_and_the_last_goes_on_until_none_is_left() {
    let agent = Agent::with(writing(7), features::MORPHS);
    let mut control = agent.control().await;
    ask(&mut control, super::prepare(SESSION, 1)).await;
    negotiate(&mut control, SESSION).await;
    let mut bulk = agent.connect(Channel::Bulk).await;
    // 150,000 bytes are two chunks and a part of a third.
    for (round, flags, chunks) in [(1, 0, 3), (2, 0, 3), (3, transfer_flags::FINAL, 7)] {
        if flags != 0 {
            taken(&ask(&mut control, step(1, CommitStep::Freeze)).await);
        }
        let mut pull = frame(TransferOp::Pull, round, Vec::new());
        pull.fixed.flags = flags;
        bulk.writer
            .send(&Message::MorphTransfer(pull))
            .await
            .unwrap();
        for n in 0..=chunks {
            let sent = next_frame(&mut bulk).await.unwrap();
            let Message::MorphTransfer(sent) = sent else {
                panic!("{sent:?}");
            };
            assert_eq!((sent.fixed.round, sent.fixed.total_bytes), (round, TOTAL));
            let op = if n < chunks {
                TransferOp::Chunk
            } else {
                TransferOp::EndOfRound
            };
            assert_eq!(sent.fixed.op, op, "chunk {n} of round {round}");
            if op == TransferOp::Chunk {
                assert_eq!(sent.fixed.offset, 3 << 48 | 5, "section and place");
                assert!(sent.chunk_holds());
            }
        }
    }
}

fn step(nonce: u64, step: CommitStep) -> Message {
    Message::MorphCommit(MorphCommit {
        session: SESSION,
        nonce,
        step,
        flags: 0,
    })
}

/// The last round, by reference: it goes to old.
fn last_round() -> Message {
    let mut pull = frame(TransferOp::Pull, 2, Vec::new());
    (pull.fixed.mode, pull.fixed.flags) = (TransferMode::ByReference, transfer_flags::FINAL);
    Message::MorphTransfer(pull)
}

fn taken(answer: &Message) -> CommitReply {
    match answer {
        Message::MorphCommitReply(reply) => *reply,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_step_that_was_taken_is_answered_as_the_first_time_whatever_its_nonce() {
    let (_agent, mut source, steps) = begun(Side::Source).await;
    for nonce in 1..4 {
        let reply = taken(&ask(&mut source, step(nonce, CommitStep::Freeze)).await);
        assert_eq!((reply.nonce, reply.status), (nonce, StepStatus::Done));
        assert_eq!(reply.state_digest, DIGEST.digest);
    }
    assert_eq!(steps.load(Ordering::Relaxed), 1);
    let early = ask(&mut source, step(1, CommitStep::Retire)).await;
    assert_eq!(
        code(&early),
        ErrorCode::UnexpectedInState,
        "the last round comes first"
    );
    for _ in 0..2 {
        let applied = ask(&mut source, last_round()).await;
        assert!(
            matches!(applied, Message::MorphTransferReply(_)),
            "{applied:?}"
        );
    }
    for nonce in 4..7 {
        let reply = taken(&ask(&mut source, step(nonce, CommitStep::Retire)).await);
        assert_eq!((reply.nonce, reply.state_digest), (nonce, 0));
    }
    assert_eq!(steps.load(Ordering::Relaxed), 2);
    let (_agent, mut target, steps) = begun(Side::Target).await;
    for (expected, digest, which) in [
        (1, DIGEST.digest, CommitStep::Activate),
        (2, 0, CommitStep::Serve),
    ] {
        for nonce in 1..4 {
            let reply = taken(&ask(&mut target, step(nonce, which)).await);
            assert_eq!((reply.nonce, reply.state_digest), (nonce, digest));
        }
        assert_eq!(steps.load(Ordering::Relaxed), expected);
    }
}

#[tokio::test]
async fn the_pull_by_reference_is_answered_with_its_own_fields_and_no_data() {
    let (_agent, mut source, _) = begun(Side::Source).await;
    let refused = ask(&mut source, last_round()).await;
    assert_eq!(
        code(&refused),
        ErrorCode::UnexpectedInState,
        "it is not frozen"
    );
    ask(&mut source, step(1, CommitStep::Freeze)).await;
    let pull = last_round();
    let applied = ask(&mut source, pull.clone()).await;
    kmp_proto::message::Expected::of(&pull)
        .unwrap()
        .check(&applied)
        .unwrap();
    let Message::MorphTransferReply(applied) = applied else {
        panic!("{applied:?}");
    };
    assert_eq!(applied.fixed.total_bytes, TOTAL);
    let nothing = (
        applied.fixed.offset,
        applied.fixed.dirty_bytes,
        applied.fixed.chunk_crc32,
    );
    assert_eq!(nothing, (0, 0, 0));
    assert!(applied.data.is_empty() && applied.references.is_empty());
}

fn rollback(session: u64, side: Side) -> Message {
    Message::MorphRollback(MorphRollback {
        fixed: RollbackFixed { session, side },
        text: "why not".to_owned(),
    })
}

#[tokio::test]
async fn once_the_new_side_serves_every_other_step_and_the_rollback_are_refused() {
    let (_agent, mut target, steps) = begun(Side::Target).await;
    taken(&ask(&mut target, step(1, CommitStep::Serve)).await);
    for request in [
        step(2, CommitStep::Freeze),
        step(2, CommitStep::Activate),
        step(2, CommitStep::Retire),
        rollback(SESSION, Side::Target),
        rollback(SESSION, Side::Source),
        rollback(SESSION + 1, Side::Target),
    ] {
        let answer = ask(&mut target, request.clone()).await;
        assert_eq!(code(&answer), ErrorCode::UnexpectedInState, "{request:?}");
    }
    assert_eq!(
        steps.load(Ordering::Relaxed),
        1,
        "the workload heard of none"
    );
}

#[tokio::test]
async fn a_rollback_has_old_serve_again_and_may_be_repeated() {
    let (_agent, mut source, _) = begun(Side::Source).await;
    ask(&mut source, step(1, CommitStep::Freeze)).await;
    for _ in 0..2 {
        let answer = ask(&mut source, rollback(SESSION, Side::Source)).await;
        let Message::MorphRollbackReply(reply) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(
            (reply.session, reply.status),
            (SESSION, RollbackStatus::Running)
        );
    }
    let over = ask(&mut source, step(2, CommitStep::Freeze)).await;
    assert_eq!(code(&over), ErrorCode::UnexpectedInState);
    let again = ask(&mut source, super::prepare(SESSION, 1)).await;
    assert_eq!(code(&again), ErrorCode::UnexpectedInState, "it is over");
}
