//! Tests a morph in which one side breaks a rule of `docs/kmp.md`. Each test names the rule.

use kmp_proto::codec::encode;
use kmp_proto::message::{
    Channel, ErrorInfo, HeartbeatReq, Hello, HelloFixed, PeerRole, STATE_CHUNK_MAX_BYTES,
    StateProvider,
};
use kmp_proto::wire::{ErrorCode, VERSION};
use kmp_transport::connection::{greet, welcome};
use kmp_transport::link::{BoxedLink, memory};
use tokio::io::AsyncWriteExt;

use super::*;

const SESSION: u64 = 11;
const TOTAL: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

fn hello(role: PeerRole) -> Hello {
    Hello {
        fixed: HelloFixed {
            version_min: VERSION,
            version_max: VERSION,
            role,
            channel: Channel::Bulk,
            flags: 0,
            generation: 1,
            boot_id: [1; 16],
            features: 0,
            session: SESSION,
            incarnation: 0,
        },
        instance: "web".to_owned(),
        kernel_release: String::new(),
        agent_version: String::new(),
        nonce: None,
        proof: None,
    }
}

/// Returns the two ends of a bulk channel: the daemon's and the instance's.
async fn channel() -> (Connection, Connection) {
    let (near, far) = memory();
    let instance = hello(PeerRole::Instance);
    let (ours, theirs) = tokio::join!(
        greet(near, hello(PeerRole::Daemon)),
        welcome(far, &instance)
    );
    (ours.unwrap(), theirs.unwrap())
}

/// A relay under way: the source has received the pull, and the target has received nothing.
struct Morph {
    source: Connection,
    target: Connection,
    round: tokio::task::JoinHandle<Result<Moved, Broken>>,
}

impl Morph {
    async fn begin() -> Self {
        let (ours_old, mut source) = channel().await;
        let (ours_new, target) = channel().await;
        let mut relay = Relay {
            source: ours_old,
            target: ours_new,
            state: IncomingState::new(SESSION, StateProvider::Cooperative),
        };
        let round = actix::spawn(async move { relay.round(fixed(TransferOp::Pull)).await });
        let pulled = next(&mut source).await;
        assert!(matches!(&pulled, Kmp::MorphTransfer(t) if t.fixed.op == TransferOp::Pull));
        Self {
            source,
            target,
            round,
        }
    }

    async fn broken(self) -> Broken {
        let round = tokio::time::timeout(PATIENCE, self.round).await;
        match round.unwrap().unwrap() {
            Err(broken) => broken,
            Ok(_) => panic!("the round came through"),
        }
    }
}

async fn next(connection: &mut Connection) -> Kmp {
    let next = tokio::time::timeout(PATIENCE, connection.reader.next());
    next.await.unwrap().unwrap().message
}

fn fixed(op: TransferOp) -> MorphTransferFixed {
    MorphTransferFixed {
        session: SESSION,
        offset: 0,
        total_bytes: TOTAL,
        dirty_bytes: 0,
        round: 1,
        flags: 0,
        chunk_crc32: 0,
        op,
        mode: TransferMode::Rounds,
        provider: StateProvider::Cooperative,
    }
}

fn chunk(bytes: usize) -> MorphTransfer {
    MorphTransfer::chunk(fixed(TransferOp::Chunk), vec![7; bytes])
}

fn bare(op: TransferOp) -> MorphTransfer {
    MorphTransfer {
        fixed: fixed(op),
        data: Vec::new(),
        references: Vec::new(),
    }
}

async fn send(connection: &mut Connection, message: Kmp) -> u32 {
    connection.writer.send(&message).await.unwrap()
}

/// Sends the end of the round from the source and receives it at the target. Returns the sequence to answer.
async fn end_of_round(morph: &mut Morph) -> u32 {
    let end = bare(TransferOp::EndOfRound);
    send(&mut morph.source, Kmp::MorphTransfer(end)).await;
    let frame = morph.target.reader.next().await.unwrap();
    assert!(
        matches!(&frame.message, Kmp::MorphTransfer(t) if t.fixed.op == TransferOp::EndOfRound)
    );
    frame.header.sequence
}

#[actix::test]
async fn a_round_goes_from_old_to_new_as_it_is_and_its_answer_ends_it() {
    let mut morph = Morph::begin().await;
    for bytes in [STATE_CHUNK_MAX_BYTES, 1] {
        send(&mut morph.source, Kmp::MorphTransfer(chunk(bytes))).await;
        assert_eq!(
            next(&mut morph.target).await,
            Kmp::MorphTransfer(chunk(bytes))
        );
    }
    let sequence = end_of_round(&mut morph).await;
    let applied = Kmp::MorphTransferReply(bare(TransferOp::Applied));
    morph.target.writer.reply(&applied, sequence).await.unwrap();
    let moved = morph.round.await.unwrap().ok().unwrap();
    assert_eq!(moved.sent_bytes, STATE_CHUNK_MAX_BYTES as u64 + 1);
    assert_eq!(moved.total_bytes, TOTAL);
}

/// Changes a chunk.
type Change = fn(&mut MorphTransfer);

#[actix::test]
async fn old_is_held_to_each_rule_of_a_transfer() {
    let changes: [(Change, &str); 6] = [
        (|c| c.data[0] ^= 1, "checksum"),
        (|c| c.fixed.session = 99, "session 99"),
        (|c| c.fixed.round = 2, "round 2"),
        (|c| c.fixed.mode = TransferMode::ByReference, ""),
        (|c| c.fixed.total_bytes += 1, "announced"),
        (
            |c| c.data = vec![0; STATE_CHUNK_MAX_BYTES + 1],
            "at most 65536",
        ),
    ];
    for (change, why) in changes {
        let mut morph = Morph::begin().await;
        send(&mut morph.source, Kmp::MorphTransfer(chunk(1))).await;
        next(&mut morph.target).await;
        let mut bad = chunk(1);
        change(&mut bad);
        send(&mut morph.source, Kmp::MorphTransfer(bad)).await;
        let broken = morph.broken().await;
        assert_eq!(broken.side, Side::Source);
        assert!(broken.why.contains(why), "{why}: {}", broken.why);
    }
    let mut morph = Morph::begin().await;
    let most = usize::try_from(TOTAL).unwrap() / STATE_CHUNK_MAX_BYTES + 1;
    for _ in 0..most {
        send(
            &mut morph.source,
            Kmp::MorphTransfer(chunk(STATE_CHUNK_MAX_BYTES)),
        )
        .await;
        next(&mut morph.target).await;
    }
    send(&mut morph.source, Kmp::MorphTransfer(chunk(1))).await;
    let broken = morph.broken().await;
    assert!(broken.why.contains("in round 1"), "{}", broken.why);
}

#[actix::test]
async fn an_answer_of_new_that_is_not_the_expected_one_ends_the_round() {
    let applied = |change: fn(&mut MorphTransferFixed)| {
        let mut reply = bare(TransferOp::Applied);
        change(&mut reply.fixed);
        Kmp::MorphTransferReply(reply)
    };
    let error = |code| {
        Kmp::Error(ErrorInfo {
            code,
            offending_type: 0x0303,
            offending_sequence: 1,
            text: "no".to_owned(),
        })
    };
    for (what, reply, behind) in [
        ("another sequence", applied(|_| ()), 1),
        ("one never sent", applied(|_| ()), u32::MAX),
        ("another session", applied(|f| f.session = 99), 0),
        ("another round", applied(|f| f.round = 2), 0),
        (
            "another operation",
            applied(|f| f.op = TransferOp::EndOfRound),
            0,
        ),
        ("the last round", applied(|f| f.flags = 1), 0),
        ("refused", error(ErrorCode::Busy), 0),
        (
            "by a code that nobody knows",
            error(ErrorCode::Other(999)),
            0,
        ),
    ] {
        let mut morph = Morph::begin().await;
        send(&mut morph.source, Kmp::MorphTransfer(chunk(1))).await;
        next(&mut morph.target).await;
        let sequence = end_of_round(&mut morph).await;
        let sequence = sequence.wrapping_sub(behind);
        morph.target.writer.reply(&reply, sequence).await.unwrap();
        let broken = morph.broken().await;
        assert_eq!(broken.side, Side::Target, "{what}: {}", broken.why);
    }
}

#[actix::test]
async fn a_request_on_a_daemons_bulk_channel_is_refused_and_the_round_goes_on() {
    let probe = Kmp::HeartbeatReq(HeartbeatReq {
        probe: 1,
        flags: 0,
        self_lag_us: 0,
    });
    let mut morph = Morph::begin().await;
    let sequence = send(&mut morph.source, probe.clone()).await;
    let refused = next(&mut morph.source).await;
    let Kmp::Error(error) = refused else {
        panic!("{refused:?}");
    };
    let named = (error.offending_type, error.offending_sequence);
    assert_eq!(
        (error.code, named),
        (ErrorCode::UnexpectedInState, (0x0101, sequence))
    );
    let end = end_of_round(&mut morph).await;
    // The target has no state to send either.
    for request in [probe, Kmp::MorphTransfer(chunk(1))] {
        send(&mut morph.target, request).await;
        let refused = next(&mut morph.target).await;
        assert!(matches!(refused, Kmp::Error(e) if e.code == ErrorCode::UnexpectedInState));
    }
    let applied = Kmp::MorphTransferReply(bare(TransferOp::Applied));
    morph.target.writer.reply(&applied, end).await.unwrap();
    assert!(morph.round.await.unwrap().is_ok());
}

/// Returns a side that sends a damaged frame.
async fn damaged(side: Side) -> (BoxedLink, tokio::task::JoinHandle<Result<Moved, Broken>>) {
    let (near, mut far) = memory();
    let greeting = actix::spawn(greet(near, hello(PeerRole::Daemon)));
    let mut reply = Vec::new();
    let own = Kmp::HelloReply(hello(PeerRole::Instance));
    encode(&own, 1, 1, &mut reply).unwrap();
    far.write_all(&reply).await.unwrap();
    let bad_side = greeting.await.unwrap().unwrap();
    let (ours, mut theirs) = channel().await;
    let (source, target) = match side {
        Side::Source => (bad_side, ours),
        Side::Target => (ours, bad_side),
    };
    let state = IncomingState::new(SESSION, StateProvider::Cooperative);
    let mut relay = Relay {
        source,
        target,
        state,
    };
    let round = actix::spawn(async move { relay.round(fixed(TransferOp::Pull)).await });
    if side == Side::Target {
        next(&mut theirs).await;
        let end = Kmp::MorphTransfer(bare(TransferOp::EndOfRound));
        send(&mut theirs, end).await;
    }
    let mut bad = Vec::new();
    encode(&Kmp::MorphTransfer(chunk(1)), 77, 1, &mut bad).unwrap();
    *bad.last_mut().unwrap() ^= 1;
    far.write_all(&bad).await.unwrap();
    (far, round)
}

#[actix::test]
async fn a_daemon_tells_of_a_bad_frame_on_either_bulk_channel() {
    use tokio::io::AsyncReadExt;
    for side in [Side::Source, Side::Target] {
        let (mut far, round) = damaged(side).await;
        let round = tokio::time::timeout(PATIENCE, round).await.unwrap();
        assert_eq!(round.unwrap().err().unwrap().side, side);
        // The relay has ended and has closed both channels: all messages are readable now.
        let mut said = Vec::new();
        far.read_to_end(&mut said).await.unwrap();
        let (mut decoder, mut input) = (kmp_proto::codec::Decoder::new(), &said[..]);
        let mut last = None;
        while let Some(frame) = decoder.feed(&mut input).unwrap() {
            last = Some(frame.message);
        }
        let Some(Kmp::Error(error)) = last else {
            panic!("{last:?}");
        };
        let named = (error.offending_type, error.offending_sequence);
        assert_eq!((error.code, named), (ErrorCode::BadCrc, (0x0303, 77)));
    }
}
