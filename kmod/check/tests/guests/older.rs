//! This module and an older one, in guests beside each other that take turns: `scripts/compare-kmod REVISION`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kmp_transport::kerf::{Host, HostStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::beside::Times;
use crate::guest::{Guest, Machine, SERIES};
use crate::host::Heartbeats;
use crate::image::built_modules;
use crate::{KERF, commands};

const ECHO: u32 = 7007;
const FOUNTAIN: u32 = 7020;
const STREAM_BYTES: usize = 4 << 20;
/// The only guest of each memory.
const GUEST: u32 = 1;
const MESSAGE_BYTES: usize = 80;
/// Boots of each module, turns of each boot, and what is done in each. Turns are short, so that what else the machine does
/// meets both; boots are several, because each lays out memory and translated code in its own way.
const BOOTS: usize = 4;
const TURNS: usize = 20;
const TRIPS: usize = 100;
const BEATS: usize = 50;

/// A guest with one of the modules.
struct Side {
    host: Host,
    guest: Guest,
    machine: Machine,
}

/// What one turn took, each in milliseconds.
struct Turn {
    /// 80 bytes to a program and back, at the median, and QEMU's CPU time of it on average.
    trip: f64,
    trip_cpu: f64,
    beat: f64,
    beat_cpu: f64,
    stream: f64,
    /// 80 bytes to a program and back beside four streams out of the guest, at the median and at the 99th of 100, and the median
    /// against alone; and MiB in a second of these streams.
    beside: f64,
    beside_p99: f64,
    beside_alone: f64,
    bulk: f64,
}

/// Prints how long a turn of each takes, and the ratio of the turns beside each other. Without an older module nothing is
/// measured.
#[test]
#[ignore = "boots guests: scripts/compare-kmod"]
fn this_module_and_an_older_one_take_turns() {
    let Some(older) = std::env::var_os("KERF_OLDER").map(PathBuf::from) else {
        println!("no older module: scripts/compare-kmod names one");
        return;
    };
    for series in SERIES {
        let mut pairs = Vec::new();
        for _ in 0..BOOTS {
            let mut now = Side::start(series, built_modules());
            let mut before = Side::start(series, older.clone());
            for turn in 0..TURNS {
                // Who goes first has what the other's turn has left in the caches.
                let pair = if turn % 2 == 0 {
                    let now = now.turn();
                    (now, before.turn())
                } else {
                    let before = before.turn();
                    (now.turn(), before)
                };
                pairs.push(pair);
            }
            for side in [&mut now, &mut before] {
                assert_eq!(side.guest.failures(), Vec::<String>::new(), "{series}");
            }
        }
        print(series, &pairs);
    }
}

/// One figure of a turn.
type Figure = fn(&Turn) -> f64;

fn print(series: &str, pairs: &[(Turn, Turn)]) {
    let figures: [(&str, Figure); 9] = [
        ("80 bytes there and back, ms", |turn| turn.trip),
        ("... QEMU's CPU time, ms", |turn| turn.trip_cpu),
        ("heartbeat, ms", |turn| turn.beat),
        ("... QEMU's CPU time, ms", |turn| turn.beat_cpu),
        ("4 MiB out of the guest, ms", |turn| turn.stream),
        ("80 bytes beside four streams, p50, ms", |turn| turn.beside),
        ("... p99, ms", |turn| turn.beside_p99),
        ("... p50 against alone", |turn| turn.beside_alone),
        ("... the streams meanwhile, MiB/s", |turn| turn.bulk),
    ];
    for (what, of) in figures {
        let now = Times::of(pairs.iter().map(|(now, _)| of(now)));
        let before = Times::of(pairs.iter().map(|(_, before)| of(before)));
        let ratios = Times::of(pairs.iter().map(|(now, before)| of(now) / of(before)));
        println!(
            "{series}: {what}: {:.3} now, {:.3} before, ratio {:.2} ({:.2} to {:.2})",
            now.quantile(50),
            before.quantile(50),
            ratios.quantile(50),
            ratios.quantile(20),
            ratios.quantile(80),
        );
    }
}

impl Side {
    fn start(series: &str, modules: PathBuf) -> Self {
        let machine = Machine::unchecked(2, modules);
        let serve = [KERF, "services", "say=serving", "forever"];
        let mut guest = machine.guest(GUEST, series, &commands(&serve));
        guest.wait_for("KERF said serving");
        let host = machine.runtime().block_on(machine.host());
        let side = Self {
            host,
            guest,
            machine,
        };
        // Translated code and buffers are there from the second time on.
        side.turn();
        side
    }

    fn turn(&self) -> Turn {
        let (host, guest) = (&self.host, &self.guest);
        self.machine.runtime().block_on(async {
            let (mut trips, mut beats) = (Times::default(), Times::default());
            let mut echo = host.connect(GUEST, ECHO).await.unwrap();
            let begun = guest.cpu_time();
            for _ in 0..TRIPS {
                trips.add(trip(&mut echo).await);
            }
            let trip_cpu = milliseconds(guest.cpu_time() - begun) / TRIPS as f64;
            let mut heartbeats = Heartbeats::new(host, GUEST).await;
            let begun = guest.cpu_time();
            for _ in 0..BEATS {
                beats.add(heartbeats.beat().await);
            }
            let beat_cpu = milliseconds(guest.cpu_time() - begun) / BEATS as f64;
            let mut fountain = host.connect(GUEST, FOUNTAIN).await.unwrap();
            let mut buffer = vec![0; STREAM_BYTES];
            let start = Instant::now();
            fountain.read_exact(&mut buffer).await.unwrap();
            let stream = milliseconds(start.elapsed());
            drop(fountain);
            let (beside, bulk) = beside_streams(host, &mut echo).await;
            Turn {
                trip: trips.quantile(50),
                trip_cpu,
                beat: beats.quantile(50),
                beat_cpu,
                stream,
                beside: beside.quantile(50),
                beside_p99: beside.quantile(99),
                beside_alone: beside.quantile(50) / trips.quantile(50),
                bulk,
            }
        })
    }
}

async fn trip(echo: &mut HostStream) -> Duration {
    let start = Instant::now();
    let mut message = [7; MESSAGE_BYTES];
    echo.write_all(&message).await.unwrap();
    echo.read_exact(&mut message).await.unwrap();
    start.elapsed()
}

/// Round trips while four streams leave the guest as fast as they can, and how fast these are, in MiB in a second.
async fn beside_streams(host: &Host, echo: &mut HostStream) -> (Times, f64) {
    const STREAMS: usize = 4;
    let bytes = Arc::new(AtomicUsize::new(0));
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = host.connect(GUEST, FOUNTAIN).await.unwrap();
        let bytes = Arc::clone(&bytes);
        streams.push(tokio::spawn(async move {
            let mut buffer = vec![0; 65536];
            while let Ok(len @ 1..) = stream.read(&mut buffer).await {
                bytes.fetch_add(len, Ordering::Relaxed);
            }
        }));
    }
    // They are under way.
    while bytes.load(Ordering::Relaxed) < STREAM_BYTES {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (start, before) = (Instant::now(), bytes.load(Ordering::Relaxed));
    let mut trips = Times::default();
    for _ in 0..TRIPS {
        trips.add(trip(echo).await);
    }
    let moved = (bytes.load(Ordering::Relaxed) - before) as f64 / f64::from(1 << 20);
    let bulk = moved / start.elapsed().as_secs_f64();
    for stream in streams {
        stream.abort();
        // Its connection has ended when the next turn begins.
        let _ = stream.await;
    }
    (trips, bulk)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
