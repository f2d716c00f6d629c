//! Rules of `docs/kmp.md` for each channel of an agent: which connection stays, how each message is answered, and
//! what ends a channel. Each test names its rule.

use kmp_proto::codec::encode;
use kmp_proto::message::{
    Authenticate, MorphTransfer, MorphTransferFixed, RecoverNotice, TransferMode, TransferOp,
    VmcoreComplete, VmcoreStart, VmcoreStartFixed,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const CHANNELS: [Channel; 3] = [Channel::Heartbeat, Channel::Control, Channel::Bulk];

fn notice(recovery: u64) -> Message {
    Message::RecoverPrepare(RecoverNotice {
        fixed: RecoverFixed {
            recovery,
            failed_generation: 7,
            cause: FailureCause::KernelDead,
        },
        instance: "db".to_owned(),
        text: String::new(),
    })
}

/// A pull that is refused, and makes a bulk channel a morph's.
fn pull() -> Message {
    Message::MorphTransfer(MorphTransfer {
        fixed: MorphTransferFixed {
            session: 1,
            offset: 0,
            total_bytes: 0,
            dirty_bytes: 0,
            round: 1,
            flags: 0,
            chunk_crc32: 0,
            op: TransferOp::Pull,
            mode: TransferMode::Rounds,
            provider: StateProvider::Cooperative,
        },
        data: Vec::new(),
        references: Vec::new(),
    })
}

/// A request of another capture: it is refused, and makes a bulk channel a capture's.
fn read() -> Message {
    Message::VmcoreStart(VmcoreStart {
        fixed: VmcoreStartFixed {
            capture: 99,
            generation: 1,
            chunk_bytes: 4096,
        },
        pci_port: None,
        windows: Vec::new(),
        ranges: Vec::new(),
    })
}

async fn ended(daemon: &mut Connection) {
    let end = next_frame(daemon).await;
    assert!(matches!(end, Err(ConnectionError::Closed)), "{end:?}");
}

/// A connection that is served: what it was asked, it has answered.
async fn served(agent: &Agent, channel: Channel, first: &Message) -> Connection {
    let mut daemon = match channel {
        Channel::Control => agent.control().await,
        other => agent.connect(other).await,
    };
    ask(&mut daemon, first.clone()).await;
    daemon
}

#[tokio::test]
async fn a_newer_connection_takes_the_place_of_the_older_which_is_closed() {
    let agent = Agent::reading_lent_memory();
    let kinds = [
        (Channel::Heartbeat, probe()),
        (Channel::Control, notice(1)),
        (Channel::Bulk, pull()),
        (Channel::Bulk, read()),
    ];
    let mut older = Vec::new();
    for (channel, first) in &kinds {
        older.push(served(&agent, *channel, first).await);
    }
    // None has taken the place of one of another kind.
    for (connection, (_, request)) in older.iter_mut().zip(&kinds) {
        ask(connection, request.clone()).await;
    }
    for (mut older, (channel, first)) in older.into_iter().zip(kinds) {
        let _newer = served(&agent, channel, &first).await;
        ended(&mut older).await;
    }
}

#[tokio::test]
async fn a_fifth_bulk_connection_without_a_request_closes_the_oldest() {
    assert_eq!(UNDECIDED_MAX, 4);
    let agent = Agent::start();
    let mut decided = served(&agent, Channel::Bulk, &pull()).await;
    let mut undecided = Vec::new();
    for _ in 0..=UNDECIDED_MAX {
        undecided.push(agent.connect(Channel::Bulk).await);
    }
    ended(&mut undecided.remove(0)).await;
    for connection in &mut undecided {
        // Not answered as the first of a morph or a capture: it still waits for one.
        let answer = ask(connection, probe()).await;
        assert_eq!(code(&answer), ErrorCode::UnexpectedInState);
    }
    ask(&mut decided, pull()).await;
}

fn frame(message: &Message, sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(message, sequence, 1, &mut bytes).unwrap();
    bytes
}

/// The daemon's end of a channel, byte by byte, whose HELLO had the sequence 1.
async fn raw(agent: &Agent, channel: Channel) -> link::BoxedLink {
    let (mut near, far) = link::memory();
    let identity = agent.identity();
    let asked = Message::Hello(agent.asked(channel));
    near.write_all(&frame(&asked, 1)).await.unwrap();
    agent
        .server
        .send(welcome(far, &identity).await.unwrap())
        .await
        .unwrap();
    let reply = next_raw(&mut near).await.unwrap();
    assert!(matches!(reply.message, Message::HelloReply(_)));
    if channel == Channel::Control {
        let status = next_raw(&mut near).await.unwrap();
        assert!(matches!(status.message, Message::HealthStatus(_)));
        // Of the agent's own numbers.
        assert_eq!(status.header.sequence, 1);
    }
    near
}

/// The next frame; `None` at the end.
async fn next_raw(near: &mut link::BoxedLink) -> Option<Frame> {
    let (mut decoder, mut byte) = (kmp_proto::codec::Decoder::new(), [0]);
    loop {
        let read = tokio::time::timeout(PATIENCE, near.read(&mut byte));
        if read.await.unwrap().unwrap() == 0 {
            return None;
        }
        if let Some(frame) = decoder.feed(&mut &byte[..]).unwrap() {
            return Some(frame);
        }
    }
}

/// All that comes at once is read before any of it is answered: this runtime has one thread.
#[tokio::test]
async fn eight_requests_are_served_at_once_and_more_are_put_off() {
    assert_eq!(REQUESTS_MAX, 8);
    let agent = Agent::start();
    let mut near = raw(&agent, Channel::Control).await;
    let asked = 2..=1 + 3 * REQUESTS_MAX;
    let bytes: Vec<_> = asked
        .clone()
        .flat_map(|n| frame(&notice(n.into()), n))
        .collect();
    near.write_all(&bytes).await.unwrap();
    let (mut done, mut put_off) = (Vec::new(), Vec::new());
    for _ in asked {
        let answer = next_raw(&mut near).await.unwrap();
        let sequence = answer.header.sequence;
        match answer.message {
            Message::RecoverPrepareReply(reply) => {
                assert_eq!(reply.recovery, u64::from(sequence));
                done.push(sequence);
            }
            Message::Retry(retry) => {
                assert_eq!(
                    (retry.reason, retry.offending_sequence),
                    (ErrorCode::Busy, sequence)
                );
                assert_eq!(retry.offending_type, 0x0201);
                put_off.push(sequence);
            }
            other => panic!("{other:?}"),
        }
    }
    let (first, ninth) = (2..2 + REQUESTS_MAX, 2 + REQUESTS_MAX);
    assert!(first.into_iter().all(|sequence| done.contains(&sequence)));
    assert!(put_off.contains(&ninth), "{put_off:?}");
    // Where there is room again, it is answered.
    near.write_all(&frame(&notice(500), 500)).await.unwrap();
    let answer = next_raw(&mut near).await.unwrap();
    assert!(matches!(answer.message, Message::RecoverPrepareReply(_)));
}

#[tokio::test]
async fn each_answer_carries_the_sequence_of_its_request() {
    let agent = Agent::start();
    let reclaim = Message::RecoverReclaim(super::notice("web", 7));
    for (channel, request, sequence, refused) in [
        (Channel::Heartbeat, probe(), 70, None),
        (Channel::Heartbeat, notice(1), 71, Some(0x0201)),
        (Channel::Control, notice(1), 72, None),
        (Channel::Control, reclaim, 73, Some(0x0202)),
        (Channel::Control, prepare(5, 1), 74, None),
        (Channel::Bulk, pull(), u32::MAX, Some(0x0303)),
    ] {
        let mut near = raw(&agent, channel).await;
        near.write_all(&frame(&request, sequence)).await.unwrap();
        let answer = next_raw(&mut near).await.unwrap();
        assert_eq!(answer.header.sequence, sequence);
        match (answer.message, refused) {
            (Message::Error(error), Some(msg_type)) => {
                let named = (error.offending_type, error.offending_sequence);
                assert_eq!(named, (msg_type, sequence));
            }
            (other, refused) => assert!(refused.is_none(), "{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_bad_frame_is_told_once_and_ends_each_channel() {
    let agent = Agent::reading_lent_memory();
    for (channel, first) in [
        (Channel::Heartbeat, None),
        (Channel::Control, None),
        (Channel::Bulk, None),
        (Channel::Bulk, Some(pull())),
        (Channel::Bulk, Some(read())),
    ] {
        let mut near = raw(&agent, channel).await;
        if let Some(first) = first {
            near.write_all(&frame(&first, 2)).await.unwrap();
            next_raw(&mut near).await.unwrap();
        }
        let mut bad = frame(&probe(), 77);
        *bad.last_mut().unwrap() ^= 1;
        // It does not look for the next frame, which is sound.
        bad.extend(frame(&probe(), 78));
        near.write_all(&bad).await.unwrap();
        let told = next_raw(&mut near).await.unwrap();
        let Message::Error(error) = told.message else {
            panic!("{told:?}");
        };
        let named = (error.offending_type, error.offending_sequence);
        assert_eq!((error.code, named), (ErrorCode::BadCrc, (0x0101, 77)));
        assert_eq!(told.header.sequence, 77);
        assert!(next_raw(&mut near).await.is_none(), "{channel:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn half_a_frame_ends_each_channel_without_an_error() {
    let agent = Agent::start();
    for channel in CHANNELS {
        let mut near = raw(&agent, channel).await;
        let begun = tokio::time::Instant::now();
        near.write_all(&frame(&probe(), 2)[..40]).await.unwrap();
        assert!(next_raw(&mut near).await.is_none(), "{channel:?}");
        assert_eq!(begun.elapsed().as_secs(), 10);
    }
}

#[tokio::test]
async fn a_second_hello_and_a_second_proof_are_refused_and_decide_nothing() {
    let agent = Agent::start();
    let mut morph = served(&agent, Channel::Bulk, &pull()).await;
    for channel in CHANNELS {
        let mut daemon = match channel {
            Channel::Control => agent.control().await,
            other => agent.connect(other).await,
        };
        let again = Message::Hello(hello(PeerRole::Daemon, channel));
        let proof = Message::Authenticate(Authenticate { proof: [0; 32] });
        for message in [again, proof.clone(), proof] {
            let answer = ask(&mut daemon, message).await;
            assert_eq!(code(&answer), ErrorCode::UnexpectedInState, "{channel:?}");
        }
    }
    // The bulk channel has become nobody's: the morph keeps its own.
    let answer = ask(&mut morph, pull()).await;
    assert_eq!(code(&answer), ErrorCode::UnexpectedInState);
}

fn error(code: ErrorCode) -> Message {
    Message::Error(ErrorInfo {
        code,
        offending_type: 0,
        offending_sequence: 0,
        text: String::new(),
    })
}

#[tokio::test]
async fn an_answer_that_its_channel_does_not_carry_ends_it() {
    let agent = Agent::reading_lent_memory();
    for (channel, first) in [
        (Channel::Heartbeat, None),
        (Channel::Control, None),
        (Channel::Bulk, None),
        (Channel::Bulk, Some(pull())),
        (Channel::Bulk, Some(read())),
    ] {
        // HEALTH_STATUS had the agent's sequence 1: what answers it is still of no type for it.
        let mut near = raw(&agent, channel).await;
        if let Some(first) = first {
            near.write_all(&frame(&first, 2)).await.unwrap();
            next_raw(&mut near).await.unwrap();
        }
        let reply = Message::RecoverPrepareReply(done(1));
        near.write_all(&frame(&reply, 1)).await.unwrap();
        assert!(next_raw(&mut near).await.is_none(), "{channel:?}");
    }
}

#[tokio::test]
async fn an_answer_to_what_was_never_sent_ends_each_channel() {
    let agent = Agent::reading_lent_memory();
    let taken = Message::VmcoreCompleteReply(VmcoreComplete {
        capture: 1,
        bytes: 0,
        status: kmp_proto::message::CaptureStatus::Complete,
    });
    for (channel, first, answer) in [
        (
            Channel::Heartbeat,
            None,
            error(ErrorCode::UnexpectedInState),
        ),
        (Channel::Control, None, error(ErrorCode::UnexpectedInState)),
        (
            Channel::Bulk,
            Some(pull()),
            error(ErrorCode::UnexpectedInState),
        ),
        (Channel::Bulk, Some(read()), taken),
    ] {
        let mut near = raw(&agent, channel).await;
        if let Some(first) = first {
            near.write_all(&frame(&first, 2)).await.unwrap();
            next_raw(&mut near).await.unwrap();
        }
        near.write_all(&frame(&answer, 99)).await.unwrap();
        assert!(next_raw(&mut near).await.is_none(), "{channel:?}");
    }
    // One to what was sent is ignored where nobody waits for it.
    let mut near = raw(&agent, Channel::Control).await;
    let late = frame(&error(ErrorCode::UnexpectedInState), 1);
    near.write_all(&[late, frame(&notice(1), 3)].concat())
        .await
        .unwrap();
    assert_eq!(next_raw(&mut near).await.unwrap().header.sequence, 3);
}

#[tokio::test]
async fn an_error_of_the_daemon_ends_a_bulk_channel_whatever_its_code_but_5() {
    let agent = Agent::reading_lent_memory();
    for first in [None, Some(pull()), Some(read())] {
        for code in [ErrorCode::Malformed, ErrorCode::Busy, ErrorCode::Other(999)] {
            let mut daemon = agent.connect(Channel::Bulk).await;
            if let Some(first) = &first {
                ask(&mut daemon, first.clone()).await;
            }
            daemon.writer.send(&error(code)).await.unwrap();
            ended(&mut daemon).await;
        }
    }
}

#[tokio::test]
async fn a_status_comes_first_on_each_control_connection_and_again_only_when_it_says_something_new()
{
    let (tell, changes) = tokio::sync::watch::channel(Condition::new(WorkloadState::Starting));
    let agent = Agent::with(Workload::told_by(changes), features::MORPHS);
    let mut near = raw(&agent, Channel::Control).await;
    let change = |change: fn(&mut Condition)| tell.send_modify(change);
    let mut sequences = Vec::new();
    for (n, alter) in [
        (|c| c.state = WorkloadState::Running) as fn(&mut Condition),
        |c| c.restarts = 1,
        |c| c.exit_status = 3,
        |c| c.text = "it has begun anew".to_owned(),
    ]
    .into_iter()
    .enumerate()
    {
        change(alter);
        let told = next_raw(&mut near).await.unwrap();
        let Message::HealthStatus(status) = told.message else {
            panic!("{told:?}");
        };
        assert_eq!(status.text.is_empty(), n < 3);
        sequences.push(told.header.sequence);
        // Nothing that a status says has changed; whether it was said shows with the next answer.
        change(|c| c.pid = Some(1));
        let number = 100 + u32::try_from(n).unwrap();
        near.write_all(&frame(&notice(1), number)).await.unwrap();
        assert_eq!(next_raw(&mut near).await.unwrap().header.sequence, number);
    }
    assert_eq!(sequences, [2, 3, 4, 5], "numbers of its own");
}
