//! The wire format: what one frame costs, and what its checksum costs.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kmp_proto::checksum::crc32;
use kmp_proto::codec::{Decoder, encode};
use kmp_proto::message::{Health, HeartbeatRsp, Message, WorkloadState};

/// How long one sample runs.
const SAMPLE: Duration = Duration::from_millis(50);
/// Samples taken; the best one counts, since everything else on the machine only adds time.
const SAMPLES: usize = 7;
/// Length of the block that checksums are compared on.
const BLOCK_BYTES: usize = 4096;

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Measurement {
    /// What was measured.
    pub(crate) name: &'static str,
    /// The figure.
    pub(crate) value: f64,
    /// Its unit: `ns` for one operation, `MiB/s`, or `x` for a ratio.
    pub(crate) unit: &'static str,
    /// The bar it should keep, in the same unit; figures in `ns` stay below it, others above.
    pub(crate) bar: Option<f64>,
}

impl Measurement {
    /// Whether the bar is kept.
    pub(crate) fn passes(&self) -> bool {
        match (self.bar, self.unit) {
            (None, _) => true,
            (Some(bar), "ns") => self.value <= bar,
            (Some(bar), _) => self.value >= bar,
        }
    }
}

/// Runs all of them: a few seconds.
pub(crate) fn run() -> Vec<Measurement> {
    let message = heartbeat();
    let mut frame = Vec::new();
    // The message keeps every limit: this cannot fail.
    let _ = encode(&message, 1, 1, &mut frame);

    let mut out = Vec::with_capacity(frame.len());
    let encoding = nanoseconds(|| {
        out.clear();
        let _ = black_box(encode(black_box(&message), 1, 1, &mut out));
    });
    let mut decoder = Decoder::new();
    let decoding = nanoseconds(|| {
        let mut input = black_box(&frame[..]);
        let _ = black_box(decoder.feed(&mut input));
    });

    let block = vec![0xA5; BLOCK_BYTES];
    let table = crc::Crc::<u32, crc::Table<1>>::new(&crc::CRC_32_ISO_HDLC);
    let one_table = nanoseconds(|| {
        black_box(table.checksum(black_box(&block)));
    });
    let ours = nanoseconds(|| {
        black_box(crc32(&[black_box(&block)]));
    });
    vec![
        figure(
            "encode a heartbeat frame (80 bytes)",
            encoding,
            "ns",
            Some(100.0),
        ),
        figure(
            "decode and verify a heartbeat frame",
            decoding,
            "ns",
            Some(100.0),
        ),
        figure("checksum of 4 KiB", mib_per_second(ours), "MiB/s", None),
        figure(
            "checksum of 4 KiB, one table",
            mib_per_second(one_table),
            "MiB/s",
            None,
        ),
        figure(
            "checksum, against one table",
            one_table / ours,
            "x",
            Some(10.0),
        ),
    ]
}

fn figure(name: &'static str, value: f64, unit: &'static str, bar: Option<f64>) -> Measurement {
    Measurement {
        name,
        value,
        unit,
        bar,
    }
}

fn heartbeat() -> Message {
    Message::HeartbeatRsp(HeartbeatRsp {
        probe: 41,
        health: Health::Healthy,
        workload: WorkloadState::Running,
        cpu_count: 4,
        cpu_busy_permille: 125,
        pressure_cpu: 150,
        pressure_memory: 0,
        pressure_io: 0,
        memory_total_kib: 262_144,
        memory_available_kib: 131_072,
        io_read_bytes: 4_096,
        io_write_bytes: 8_192,
    })
}

fn mib_per_second(nanoseconds_per_block: f64) -> f64 {
    BLOCK_BYTES as f64 / nanoseconds_per_block * 1e9 / (1024.0 * 1024.0)
}

/// Nanoseconds for one call, in the best sample.
fn nanoseconds(mut call: impl FnMut()) -> f64 {
    const BATCH: u32 = 256;
    let mut best = f64::INFINITY;
    for _ in 0..SAMPLES {
        let (start, mut calls) = (Instant::now(), 0u32);
        let elapsed = loop {
            for _ in 0..BATCH {
                call();
            }
            calls += BATCH;
            let elapsed = start.elapsed();
            if elapsed >= SAMPLE {
                break elapsed;
            }
        };
        best = best.min(elapsed.as_secs_f64() * 1e9 / f64::from(calls));
    }
    best
}
