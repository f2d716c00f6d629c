//! Connections, and the multiplexer over them, on links in memory that lose, delay, corrupt and repeat data, or die.
//! The same seed gives the same faults. Waits use virtual time.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod hello;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hello::hello;
use kmp_proto::message::{
    Channel, Health, HeartbeatReq, HeartbeatRsp, HeartbeatRspFixed, Message, PRESSURE_ABSENT,
    PeerRole, RecoverReply, WorkloadState,
};
use kmp_transport::connection::{Connection, greet, welcome};
use kmp_transport::link::{BoxedLink, FaultPlan, FaultyLink, memory};
use kmp_transport::peer::{Connecting, Peer, PeerEvent};
use tokio::sync::mpsc;

/// Number of seeds; a failure names its seed.
const SEEDS: u64 = 100;
/// Number of messages sent over one link.
const MESSAGES: u32 = 50;
/// Number of answers on each channel that prove the progress of a peer.
const ANSWERS: u32 = 100;
/// Maximum wait, in virtual time.
const PATIENCE: Duration = Duration::from_secs(3600);

fn probe(number: u32) -> Message {
    Message::HeartbeatReq(HeartbeatReq {
        probe: number,
        flags: 0,
        self_lag_us: 0,
    })
}

fn answer(number: u32) -> Message {
    Message::HeartbeatRsp(HeartbeatRsp::from(HeartbeatRspFixed {
        probe: number,
        health: Health::Healthy,
        workload: WorkloadState::Running,
        cpu_count: 1,
        cpu_busy_permille: 0,
        pressure_cpu: PRESSURE_ABSENT,
        pressure_memory: PRESSURE_ABSENT,
        pressure_io: PRESSURE_ABSENT,
        memory_total_kib: 0,
        memory_available_kib: 0,
        io_read_bytes: 0,
        io_write_bytes: 0,
    }))
}

/// Returns a link whose daemon end is faulty in both directions.
fn faulty(plan: FaultPlan, seed: u64) -> (BoxedLink, BoxedLink) {
    let (daemon, instance) = memory();
    let daemon = FaultyLink::new(daemon, plan, seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    (Box::new(daemon), instance)
}

/// Exchanges HELLO; returns `None` if the link's faults prevent the exchange.
async fn introduced(plan: FaultPlan, seed: u64) -> Option<(Connection, Connection)> {
    let (daemon, instance) = faulty(plan, seed);
    let own = hello(PeerRole::Instance);
    let greeting = greet(daemon, hello(PeerRole::Daemon));
    let (daemon, instance) = tokio::join!(greeting, welcome(instance, &own));
    Some((daemon.ok()?, instance.ok()?))
}

/// Like [`try_arrived`], within [`PATIENCE`].
async fn arrived(plan: FaultPlan, seed: u64) -> Option<Vec<u32>> {
    let arrived = tokio::time::timeout(PATIENCE, try_arrived(plan, seed)).await;
    arrived.unwrap_or_else(|_| panic!("seed {seed}: it does not end"))
}

/// Sends probes to the daemon and hangs up; returns the numbers of the probes that arrived.
async fn try_arrived(plan: FaultPlan, seed: u64) -> Option<Vec<u32>> {
    let (mut daemon, instance) = introduced(plan, seed).await?;
    let sending = tokio::spawn(async move {
        // Both halves of the connection end in this task.
        let mut instance = instance;
        for number in 0..MESSAGES {
            if instance.writer.send(&probe(number)).await.is_err() {
                return;
            }
            // A pause after each frame, so that a fault hits one frame or part of one.
            tokio::time::sleep(Duration::from_micros(1)).await;
        }
    });
    let mut numbers = Vec::new();
    while let Ok(frame) = daemon.reader.next().await {
        match frame.message {
            Message::HeartbeatReq(request) => numbers.push(request.probe),
            other => panic!("seed {seed}: nobody sent {other:?}"),
        }
    }
    drop(daemon);
    sending.await.unwrap();
    Some(numbers)
}

#[tokio::test(start_paused = true)]
async fn what_is_cut_into_parts_and_held_up_arrives_whole_and_in_order() {
    let plan = FaultPlan {
        short_permille: 900,
        delay_permille: 200,
        delay: Duration::from_millis(50),
        ..FaultPlan::default()
    };
    for seed in 0..SEEDS {
        let numbers = arrived(plan, seed).await;
        let all: Vec<u32> = (0..MESSAGES).collect();
        assert_eq!(numbers, Some(all), "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_bent_or_torn_never_becomes_a_message() {
    let plan = FaultPlan {
        short_permille: 100,
        flip_permille: 20,
        ..FaultPlan::default()
    };
    let mut cut_short = 0;
    for seed in 0..SEEDS {
        let Some(numbers) = arrived(plan, seed).await else {
            continue;
        };
        let first: Vec<u32> = (0..).take(numbers.len()).collect();
        assert_eq!(numbers, first, "seed {seed}");
        cut_short += u32::from(numbers.len() < MESSAGES as usize);
    }
    assert!(cut_short > 10, "the faults struck {cut_short} links");
}

#[tokio::test(start_paused = true)]
async fn what_is_lost_or_repeated_invents_nothing() {
    let plan = FaultPlan {
        loss_permille: 20,
        repeat_permille: 20,
        ..FaultPlan::default()
    };
    let (mut lost, mut repeated) = (0, 0);
    for seed in 0..SEEDS {
        let Some(numbers) = arrived(plan, seed).await else {
            continue;
        };
        // Whole frames may be missing or duplicated; no frame is invented or out of order.
        assert!(numbers.is_sorted(), "seed {seed}: {numbers:?}");
        assert!(numbers.iter().all(|n| *n < MESSAGES), "seed {seed}");
        lost += u32::from(numbers.windows(2).any(|pair| pair[1] > pair[0] + 1));
        repeated += u32::from(numbers.windows(2).any(|pair| pair[1] == pair[0]));
    }
    assert!(lost > 5 && repeated > 5, "lost {lost}, repeated {repeated}");
}

/// Runs the instance's end of one link: answers every request.
async fn live(link: BoxedLink) {
    let Ok(mut connection) = welcome(link, &hello(PeerRole::Instance)).await else {
        return;
    };
    while let Ok(frame) = connection.reader.next().await {
        let reply = match frame.message {
            Message::HeartbeatReq(request) => answer(request.probe),
            Message::RecoverPrepare(notice) => Message::RecoverPrepareReply(RecoverReply {
                recovery: notice.fixed.recovery,
                elapsed_ms: 0,
            }),
            other => panic!("nobody asked {other:?}"),
        };
        let sent = connection.writer.reply(&reply, frame.header.sequence).await;
        if sent.is_err() {
            return;
        }
    }
}

fn notice(recovery: u64) -> Message {
    use kmp_proto::message::{FailureCause, RecoverFixed, RecoverNotice};
    Message::RecoverPrepare(RecoverNotice {
        fixed: RecoverFixed {
            recovery,
            failed_generation: 1,
            cause: FailureCause::KernelDead,
        },
        instance: "db".to_owned(),
        text: String::new(),
    })
}

/// Sends requests on both channels until each has [`ANSWERS`] answers; returns how often a channel went down.
async fn goes_on(plan: FaultPlan, seed: u64) -> u32 {
    let links = AtomicU64::new(seed << 32);
    let connector = Arc::new(move || -> Connecting {
        let (daemon, instance) = faulty(plan, links.fetch_add(1, Ordering::Relaxed));
        tokio::spawn(live(instance));
        Box::pin(async move { Ok(daemon) })
    });
    let (told, mut events) = mpsc::unbounded_channel();
    let sink = Arc::new(move |event| drop(told.send(event)));
    let peer = Peer::over(connector, hello(PeerRole::Daemon), seed | 1, sink);
    let (mut heartbeats, mut replies, mut down) = (0, 0, 0);
    let mut asked = 0;
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    while heartbeats < ANSWERS || replies < ANSWERS {
        let event = tokio::select! {
            event = events.recv() => event.unwrap(),
            _ = tick.tick() => {
                asked += 1;
                // Refused if the channel is down and its queue is full.
                let _ = peer.send(Channel::Heartbeat, 0, probe(asked));
                let _ = peer.send(Channel::Control, u64::from(asked), notice(asked.into()));
                continue;
            }
        };
        match event {
            PeerEvent::Frame(channel, frame) => match (channel, frame.message) {
                (Channel::Heartbeat, Message::HeartbeatRsp(rsp)) => {
                    assert!(rsp.fixed.probe <= asked, "seed {seed}");
                    heartbeats += 1;
                }
                (Channel::Control, Message::RecoverPrepareReply(reply)) => {
                    assert!(reply.recovery <= u64::from(asked), "seed {seed}");
                    replies += 1;
                }
                // The instance's end reports a bad frame in this way.
                (_, Message::Error(_)) => {}
                (channel, other) => panic!("seed {seed}: {other:?} on {channel:?}"),
            },
            PeerEvent::Down(..) => down += 1,
            _ => {}
        }
    }
    down
}

#[tokio::test(start_paused = true)]
async fn a_peer_outlives_links_that_bend_lose_repeat_and_die() {
    let plan = FaultPlan {
        short_permille: 100,
        flip_permille: 5,
        loss_permille: 5,
        repeat_permille: 5,
        close_permille: 10,
        delay_permille: 50,
        delay: Duration::from_millis(30),
    };
    let mut down = 0;
    for seed in 0..SEEDS / 5 {
        let ended = tokio::time::timeout(PATIENCE, goes_on(plan, seed)).await;
        down += ended.unwrap_or_else(|_| panic!("seed {seed}: it does not go on"));
    }
    assert!(down > 20, "its channels went down {down} times");
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_strikes_the_same_way() {
    let plan = FaultPlan {
        flip_permille: 10,
        loss_permille: 10,
        repeat_permille: 10,
        close_permille: 10,
        ..FaultPlan::default()
    };
    let mut outcomes = Vec::new();
    for seed in 0..SEEDS {
        let first = arrived(plan, seed).await;
        assert_eq!(first, arrived(plan, seed).await, "seed {seed}");
        outcomes.push(first);
    }
    outcomes.dedup();
    assert!(outcomes.len() > 10, "and another seed another way");
}
