//! Heartbeats of a guest's kernel, and small messages to its programs, beside what else may keep the guest busy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kmp_transport::kerf::{HOST, Host};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::guest::{Machine, SERIES};
use crate::host::Heartbeats;
use crate::hostile::{Header, Op, Raw, STREAM};
use crate::{KERF, commands};

/// Ports of the services in the guest.
const ECHO: u32 = 7007;
const SINK: u32 = 7009;
const FOUNTAIN: u32 = 7020;
const STUCK: u32 = 7021;
/// The guest's kernel.
const HEARTBEAT: u32 = 9001;
/// Where nobody listens.
const NOWHERE: u32 = 7998;
/// The guest, and who floods it.
const GUEST: u32 = 1;
const FLOODER: u32 = 2;
/// Turns of each load, and heartbeats and messages in each.
const TURNS: usize = 3;
const BEATS: usize = 100;

/// What keeps the guest busy meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Alone,
    /// Another peer sends packets that mean nothing.
    Resets,
    /// Another peer sends packets that break the rules.
    Junk,
    /// Four streams from the host to programs of the guest, over the link of the heartbeats.
    StreamsIn,
    /// Four streams from programs of the guest to the host.
    StreamsOut,
}

const LOADS: [Load; 5] = [
    Load::Alone,
    Load::Resets,
    Load::Junk,
    Load::StreamsIn,
    Load::StreamsOut,
];

/// Milliseconds that something took each time.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<f64>);

impl Times {
    pub(crate) fn of(times: impl Iterator<Item = f64>) -> Self {
        Self(times.collect())
    }

    pub(crate) fn add(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1000.0);
    }

    pub(crate) fn quantile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
    }
}

/// Heartbeats are answered by the kernel whatever else comes. The figures depend on the machine and are printed;
/// that each one is answered does not.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn heartbeats_pass_floods_and_streams() {
    for series in SERIES {
        let machine = Machine::new(3);
        let then = [KERF, "services", "say=serving", "forever"];
        let mut guest = machine.guest(GUEST, series, &commands(&then));
        guest.wait_for("KERF said serving");
        let mut beats: [Times; 5] = Default::default();
        let mut trips: [Times; 5] = Default::default();
        let host = machine.runtime().block_on(machine.host());
        for _ in 0..TURNS {
            for (n, load) in LOADS.into_iter().enumerate() {
                let (beat, trip) = measure(&machine, &host, load);
                beats[n].0.extend(beat.0);
                trips[n].0.extend(trip.0);
            }
        }
        for (what, times) in [("heartbeat", &beats), ("80 bytes there and back", &trips)] {
            let alone = times[0].quantile(99);
            for (load, times) in LOADS.iter().zip(times) {
                let [p50, p99, max] = [50, 99, 100].map(|percent| times.quantile(percent));
                println!(
                    "{series}: {what}, {load:?}: p50 {p50:.2} ms, p99 {p99:.2} ms ({:.1} x alone), max {max:.2} ms",
                    p99 / alone
                );
            }
        }
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// A guest of several CPUs talks to itself, to the host's streams and to a peer that floods, all at once.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn several_cpus_share_the_links() {
    for (cpus, series) in [(4, "6.12")] {
        let machine = Machine::new(3).cpus(cpus);
        let then = [
            KERF,
            "services",
            "say=serving",
            "cases=1",
            "complaints",
            "say=alone",
            "forever",
        ];
        let mut guest = machine.guest(GUEST, series, &commands(&then));
        guest.wait_for("KERF said serving");
        let host = machine.runtime().block_on(machine.host());
        for load in LOADS {
            let (beats, trips) = measure(&machine, &host, load);
            let [beat, trip] = [beats, trips].map(|times| times.quantile(50));
            println!(
                "{series}, {cpus} CPUs: {load:?}: heartbeat {beat:.2} ms, 80 bytes {trip:.2} ms"
            );
        }
        guest.wait_for("KERF said alone");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// A program sleeps in `send()`, in a page fault, with its socket's lock. The kernel answers heartbeats meanwhile, also when
/// there are packets for that socket and for others; and when the fault is over everything has arrived.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn heartbeats_pass_a_stuck_sender() {
    const PAGE_BYTES: usize = 4096;
    for series in SERIES {
        let machine = Machine::new(2);
        let answers = format!("until=0.tx_packets.{}", 3 * BEATS);
        let then = [
            KERF,
            "services",
            "say=serving",
            &answers,
            "resolve",
            "forever",
        ];
        let mut guest = machine.guest(GUEST, series, &commands(&then));
        guest.wait_for("KERF said serving");
        let times = machine.runtime().block_on(async {
            let host = machine.host().await;
            let mut heartbeats = Heartbeats::new(&host, GUEST).await;
            let mut stuck = host.connect(GUEST, STUCK).await.unwrap();
            let mut sink = host.connect(GUEST, SINK).await.unwrap();
            let mut times = Times::default();
            // More than the ring holds goes to the other socket, as far as its credit reaches.
            let sinking = tokio::spawn(async move {
                sink.write_all(&vec![1; 400_000]).await.unwrap();
                sink.shutdown().await.unwrap();
                let mut text = String::new();
                sink.read_to_string(&mut text).await.unwrap();
                text
            });
            for _ in 0..3 * BEATS {
                stuck.write_all(&[1]).await.unwrap();
                times.add(heartbeats.beat().await);
            }
            let mut page = [1; PAGE_BYTES];
            stuck.read_exact(&mut page).await.unwrap();
            assert_eq!(page, [0; PAGE_BYTES]);
            stuck.shutdown().await.unwrap();
            let mut text = String::new();
            stuck.read_to_string(&mut text).await.unwrap();
            let sent = 3 * BEATS;
            assert_eq!(text, format!("{sent} {sent}"), "{series}");
            assert_eq!(sinking.await.unwrap(), "400000 400000", "{series}");
            times
        });
        let [p50, p99, max] = [50, 99, 100].map(|percent| times.quantile(percent));
        println!(
            "{series}: heartbeat beside a stuck sender: p50 {p50:.2} ms, p99 {p99:.2} ms, max {max:.2} ms"
        );
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

/// A program is stuck in `send()`, and more packets came than may wait for sockets, so the guest leaves them in the ring. It
/// looks for heartbeats behind them and answers.
#[test]
#[ignore = "boots guests: make kmod-test"]
fn heartbeats_pass_what_stays_in_the_ring() {
    /// More packets than there is room for, of the largest kind.
    const PACKETS_MAX: usize = 1000;
    const PACKET_BYTES: usize = 32_000;
    /// A packet that is not taken for so long stays.
    const STAYS: Duration = Duration::from_secs(2);
    for series in SERIES {
        let machine = Machine::new(2);
        let then = [
            KERF,
            "services",
            "say=serving",
            // The answers to two connections: the program's, and the kernel's own.
            "until=0.tx_packets.2",
            "resolve",
            "complaints",
            "say=end",
            "forever",
        ];
        let mut guest = machine.guest(GUEST, series, &commands(&then));
        guest.wait_for("KERF said serving");
        let mut raw = Raw::new(&machine, GUEST);
        raw.connect(STREAM, STUCK);
        guest.wait_for("KERF said stuck");
        let data = Header::new(STREAM, Op::Data, STUCK);
        let stayed = (0..PACKETS_MAX).any(|_| {
            raw.send(&data, &[0; PACKET_BYTES]);
            let start = Instant::now();
            while !machine.is_taken(HOST, GUEST) && start.elapsed() < STAYS {
                std::thread::sleep(Duration::from_micros(100));
            }
            !machine.is_taken(HOST, GUEST)
        });
        assert!(stayed, "{series}: everything was taken");
        let heartbeat = Header::new(STREAM, Op::Request, HEARTBEAT);
        raw.send(&heartbeat, b"");
        let answer = raw.take();
        assert_eq!(
            (answer.op, answer.port),
            (Op::Response as u16, HEARTBEAT),
            "{series}"
        );
        guest.wait_for("KERF said end");
        assert_eq!(guest.failures(), Vec::<String>::new(), "{series}");
    }
}

fn measure(machine: &Machine, host: &Host, load: Load) -> (Times, Times) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flooder = matches!(load, Load::Resets | Load::Junk)
            .then(|| scope.spawn(|| flood(machine, load, &done)));
        let times = machine.runtime().block_on(async {
            let streams = streams(host, load).await;
            let times = times(host).await;
            for stream in streams {
                stream.abort();
            }
            times
        });
        done.store(true, Ordering::Relaxed);
        if let Some(flooder) = flooder {
            println!("{load:?}: {} packets", flooder.join().unwrap());
        }
        times
    })
}

fn flood(machine: &Machine, load: Load, done: &AtomicBool) -> u64 {
    let mut raw = Raw::as_peer(machine, FLOODER, GUEST);
    let mut header = Header::new(STREAM, Op::Reset, NOWHERE);
    header.excess = u32::from(load == Load::Junk);
    let mut done = || done.load(Ordering::Relaxed);
    raw.flood_until(&mut done, u64::MAX, &mut |_| (header, b""))
}

async fn streams(host: &Host, load: Load) -> Vec<JoinHandle<()>> {
    let mut streams = Vec::new();
    let port = match load {
        Load::StreamsIn => SINK,
        Load::StreamsOut => FOUNTAIN,
        _ => return streams,
    };
    for _ in 0..4 {
        let mut stream = host.connect(GUEST, port).await.unwrap();
        streams.push(tokio::spawn(async move {
            let mut buffer = vec![0; 65536];
            // It ends with the link, when the test does.
            while match load {
                Load::StreamsIn => stream.write_all(&buffer).await.is_ok(),
                _ => stream.read_exact(&mut buffer).await.is_ok(),
            } {}
        }));
    }
    streams
}

async fn times(host: &Host) -> (Times, Times) {
    let mut heartbeats = Heartbeats::new(host, GUEST).await;
    let mut echo = host.connect(GUEST, ECHO).await.unwrap();
    let (mut beats, mut trips) = (Times::default(), Times::default());
    for _ in 0..BEATS {
        beats.add(heartbeats.beat().await);
        let start = Instant::now();
        let mut message = [7; 80];
        echo.write_all(&message).await.unwrap();
        echo.read_exact(&mut message).await.unwrap();
        trips.add(start.elapsed());
    }
    (beats, trips)
}
