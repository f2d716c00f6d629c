//! vsock between a guest and the host, over kerf-vsock and over virtio-vsock, alternating: the same guest, program and
//! client.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kmorph_control_api::PingReport;
use kmorph_tests::kernels::{self, Transport};
use kmorph_tests::{Events, Host, program};
use serde_json::json;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit, milliseconds, quantile_of};
use crate::instances::{spawn, terminate};

const GROUP: &str = "vsock";
const SERIES: [&str; 2] = ["6.1", "6.12"];
const NAME: &str = "measured";
/// Port of the program in the guest.
const PORT: u16 = 7007;
const MESSAGE_BYTES: usize = 80;
/// Number of turns of each transport, and the measurements in each turn.
const TURNS: usize = 7;
const TRIPS: usize = 400;
const STREAM_BYTES: usize = 32 << 20;
const PINGS: usize = 200;
/// Number of streams beside which small messages are measured.
const STREAMS: usize = 4;
/// Timeout of any operation on a guest.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run() -> Found {
    let present = |series: &&str| kernels::cache().join("kernels").join(series).is_file();
    if let Some(missing) = SERIES.iter().find(|series| !present(series)) {
        let remark =
            format!("vsock: not measured, there is no kernel {missing}: run scripts/setup-tests");
        let (figures, remarks) = (Vec::new(), vec![remark]);
        return Found { figures, remarks };
    }
    let mut found = Found::default();
    for series in SERIES {
        found.figures.extend(measure(series));
    }
    let mebibytes = STREAM_BYTES >> 20;
    found.remarks.push(format!(
        "vsock: {TURNS} turns of each transport, {TRIPS} round trips, {mebibytes} MiB and {PINGS} heartbeats in each; \
         heartbeats are kmorphd's, as kmorphctl ping asks for them"
    ));
    found
}

/// A guest reached over one transport.
struct Guest {
    host: Host,
    socket: PathBuf,
    trips: Vec<f64>,
    turns: Vec<[f64; 2]>,
    trips_beside: Vec<f64>,
    seconds: Vec<f64>,
    idle: Vec<f64>,
    busy: Vec<f64>,
}

fn measure(series: &str) -> Vec<Figure> {
    let [mut kerf, mut virtio] =
        [Transport::Kerf, Transport::Virtio].map(|transport| Guest::start(series, transport));
    for _ in 0..TURNS {
        for guest in [&mut kerf, &mut virtio] {
            guest.round_trips();
            guest.stream();
            guest.heartbeats();
            guest.round_trips_beside_streams();
        }
    }
    for guest in [&kerf, &virtio] {
        terminate(&guest.host, NAME);
    }
    figures(series, kerf, virtio)
}

impl Guest {
    fn start(series: &str, transport: Transport) -> Self {
        let transport = transport.as_str();
        let host = Host::with(&format!(
            "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 10.0\nmemory_mib = 256\n\
             [pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n[qemu]\ntransport = \"{transport}\"\n"
        ));
        let events = Events::follow(host.control());
        let request = json!({
            "name": NAME,
            "kernel": kernels::debian(series),
            "workload": { "program": program("kmorph-bench-guest"), "args": [] },
            "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": PORT }],
        });
        spawn(&host, &events, &request);
        let run_dir = PathBuf::from(host.control().instance(NAME).run_dir);
        let guest = Self {
            socket: run_dir.join("vsock.sock"),
            host,
            trips: Vec::new(),
            turns: Vec::new(),
            trips_beside: Vec::new(),
            seconds: Vec::new(),
            idle: Vec::new(),
            busy: Vec::new(),
        };
        // From the second transfer on, code is translated and buffers are allocated.
        receive(&guest.socket, STREAM_BYTES);
        guest
    }

    fn round_trips(&mut self) {
        let trips = round_trips(&self.socket);
        self.turns
            .push([50, 99].map(|part| quantile_of(&trips, part)));
        self.trips.extend(trips);
    }

    /// Measures round trips while streams use all capacity of the transport and of the guest's CPU.
    fn round_trips_beside_streams(&mut self) {
        let socket = &self.socket;
        let trips = beside_streams(socket, STREAMS, || round_trips(socket));
        self.trips_beside.extend(trips);
    }

    fn stream(&mut self) {
        let begin = Instant::now();
        receive(&self.socket, STREAM_BYTES);
        self.seconds.push(begin.elapsed().as_secs_f64());
    }

    /// Measures heartbeats on an idle guest, and while a stream uses all capacity of the transport.
    fn heartbeats(&mut self) {
        let host = &self.host;
        let ping = || {
            let path = format!("/v1/instances/{NAME}/ping");
            let reply = host.control().request("POST", &path, None);
            let result: PingReport = reply.ok();
            Duration::from_micros(result.rtt_us)
        };
        let pings = || (0..PINGS).map(|_| milliseconds(ping()));
        self.idle.extend(pings());
        let busy = beside_streams(&self.socket, 1, || pings().collect::<Vec<_>>());
        self.busy.extend(busy);
    }
}

fn connect(path: &Path) -> UnixStream {
    let mut socket = UnixStream::connect(path).expect("the transport accepts");
    socket
        .set_read_timeout(Some(PATIENCE))
        .expect("it is not zero");
    socket
        .set_write_timeout(Some(PATIENCE))
        .expect("it is not zero");
    // A single write: vhost-device-vsock takes the result of one read for the whole line.
    let line = format!("CONNECT {PORT}\n");
    let asked = socket.write_all(line.as_bytes());
    asked.expect("the transport takes it");
    let mut line = [0; "OK 7007\n".len()];
    socket.read_exact(&mut line).expect("the guest answers");
    assert!(line.starts_with(b"OK "), "{line:?}");
    socket
}

/// Runs `measure` while the guest sends `streams` endless streams.
fn beside_streams<T>(path: &Path, streams: usize, measure: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..streams {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    receive(path, STREAM_BYTES / streams);
                }
            });
        }
        let found = measure();
        done.store(true, Ordering::Relaxed);
        found
    })
}

/// Returns the milliseconds of each message's round trip to a program of the guest, after some warm-up messages.
fn round_trips(path: &Path) -> Vec<f64> {
    let mut socket = connect(path);
    socket.write_all(b"e").expect("the guest takes it");
    let mut trip = || {
        let begin = Instant::now();
        let mut message = [7; MESSAGE_BYTES];
        socket.write_all(&message).expect("the guest takes it");
        socket.read_exact(&mut message).expect("it comes back");
        milliseconds(begin.elapsed())
    };
    for _ in 0..TRIPS / 10 {
        trip();
    }
    (0..TRIPS).map(|_| trip()).collect()
}

/// Makes the guest send this number of bytes, and receives them.
fn receive(path: &Path, bytes: usize) {
    let mut socket = connect(path);
    let mut request = vec![b's'];
    request.extend((bytes as u64).to_le_bytes());
    socket.write_all(&request).expect("the guest takes it");
    let mut buffer = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let len = socket.read(&mut buffer).expect("they come");
        assert_ne!(len, 0, "{left} bytes are missing");
        left -= len;
    }
}

fn figures(series: &str, kerf: Guest, virtio: Guest) -> Vec<Figure> {
    let name = |what: &str| format!("Linux {series}: {what}");
    let ratios = |of: &[f64], to: &[f64]| -> Vec<f64> {
        of.iter().zip(to).map(|(of, to)| of / to).collect()
    };
    let part = |guest: &Guest, at: usize| -> Vec<f64> {
        guest.turns.iter().map(|turn| turn[at]).collect()
    };
    let ratio = |what: &str, values| Figure::of(GROUP, name(what), Unit::Ratio, values);
    let times = |what: &str, values: &[f64]| {
        Figure::of(GROUP, name(what), Unit::Milliseconds, values.to_vec())
    };
    let speed = |what: &str, guest: &Guest| {
        #[expect(clippy::cast_precision_loss, reason = "a round number of MiB")]
        let mebibytes = (STREAM_BYTES >> 20) as f64;
        let speeds = guest.seconds.iter().map(|s| mebibytes / s).collect();
        Figure::of(GROUP, name(what), Unit::MebibytesPerSecond, speeds)
    };
    let slowed =
        |guest: &Guest| quantile_of(&guest.trips_beside, 50) / quantile_of(&guest.trips, 50);
    let worse = |guest: &Guest| quantile_of(&guest.busy, 99) / quantile_of(&guest.idle, 99);
    vec![
        times("80 bytes there and back, kerf", &kerf.trips),
        times("80 bytes there and back, virtio", &virtio.trips),
        ratio(
            "p50 of a turn, kerf against virtio",
            ratios(&part(&kerf, 0), &part(&virtio, 0)),
        )
        .bar(Bar::at_most(Of::P50, 0.7)),
        ratio(
            "p99 of a turn, kerf against virtio",
            ratios(&part(&kerf, 1), &part(&virtio, 1)),
        )
        .bar(Bar::at_most(Of::P50, 0.7)),
        times("80 bytes beside four streams, kerf", &kerf.trips_beside),
        times("80 bytes beside four streams, virtio", &virtio.trips_beside),
        ratio(
            "p50 of 80 bytes beside four streams against alone, kerf",
            vec![slowed(&kerf)],
        )
        .bar(Bar::at_most(Of::Max, 1.5)),
        ratio(
            "p50 of 80 bytes beside four streams against alone, virtio",
            vec![slowed(&virtio)],
        ),
        speed("a stream from the guest, kerf", &kerf),
        speed("a stream from the guest, virtio", &virtio),
        ratio(
            "a stream's time, virtio against kerf",
            ratios(&virtio.seconds, &kerf.seconds),
        )
        .bar(Bar::at_least(Of::P50, 2.0)),
        times("heartbeat, kerf", &kerf.idle),
        times("heartbeat beside a stream, kerf", &kerf.busy),
        times("heartbeat, virtio", &virtio.idle),
        times("heartbeat beside a stream, virtio", &virtio.busy),
        ratio(
            "p99 of heartbeats beside a stream against without, kerf",
            vec![worse(&kerf)],
        )
        .bar(Bar::at_most(Of::Max, 2.0)),
        ratio(
            "p99 of heartbeats beside a stream against without, virtio",
            vec![worse(&virtio)],
        ),
    ]
}
