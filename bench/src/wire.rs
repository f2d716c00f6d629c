//! The wire format: the cost of one frame, and of its checksum.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kmp_proto::checksum::crc32;
use kmp_proto::codec::{Decoder, encode};
use kmp_proto::message::{Health, HeartbeatRsp, HeartbeatRspFixed, Message, WorkloadState};

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};

const GROUP: &str = "wire";

/// Duration of one sample.
const SAMPLE: Duration = Duration::from_millis(50);
/// Number of samples.
const SAMPLES: usize = 7;
/// Size of the block on which checksums are compared, bytes.
const BLOCK_BYTES: usize = 4096;

/// Measures all figures: a few seconds.
pub(crate) fn run() -> Found {
    let message = heartbeat();
    let mut frame = Vec::new();
    // The message obeys every limit, so encoding cannot fail.
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
    let rate = |times: &[f64]| times.iter().copied().map(mib_per_second).collect();
    let ratio = best(&one_table) / best(&ours);
    let of = |name: &str, unit, values| Figure::of(GROUP, name, unit, values);
    // The best sample counts: other work on the machine only adds time.
    let figures = vec![
        of(
            "encode a heartbeat frame (80 bytes)",
            Unit::Nanoseconds,
            encoding,
        )
        .bar(Bar::at_most(Of::Min, 100.0)),
        of(
            "decode and verify a heartbeat frame",
            Unit::Nanoseconds,
            decoding,
        )
        .bar(Bar::at_most(Of::Min, 100.0)),
        of("checksum of 4 KiB", Unit::MebibytesPerSecond, rate(&ours)),
        of(
            "checksum of 4 KiB, one table",
            Unit::MebibytesPerSecond,
            rate(&one_table),
        ),
        Figure::single(GROUP, "checksum, against one table", Unit::Ratio, ratio)
            .bar(Bar::at_least(Of::Min, 10.0)),
    ];
    let remarks = Vec::new();
    Found { figures, remarks }
}

fn heartbeat() -> Message {
    Message::HeartbeatRsp(HeartbeatRsp::from(HeartbeatRspFixed {
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
    }))
}

fn mib_per_second(nanoseconds_per_block: f64) -> f64 {
    BLOCK_BYTES as f64 / nanoseconds_per_block * 1e9 / (1024.0 * 1024.0)
}

fn best(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Returns the nanoseconds per call, for each sample.
fn nanoseconds(mut call: impl FnMut()) -> Vec<f64> {
    const BATCH: u32 = 256;
    let sample = |_| {
        let (start, mut calls) = (Instant::now(), 0u32);
        loop {
            for _ in 0..BATCH {
                call();
            }
            calls += BATCH;
            let elapsed = start.elapsed();
            if elapsed >= SAMPLE {
                return elapsed.as_secs_f64() * 1e9 / f64::from(calls);
            }
        }
    };
    (0..SAMPLES).map(sample).collect()
}
