//! How long clients wait: from the freeze to the first answer of the new process.
//!
//! A measurement, to be run in release:
//! `cargo test --release -p kmorph-workload --test downtime -- --ignored --nocapture`

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kmorph_workload::handover::message::Role;
use support::{Client, Server, activate, freeze, listener, prepare_by_reference, serve};

const VALUE_BYTES: usize = 4096;
const MORPHS: usize = 50;

fn measure(values_bytes: usize) -> Vec<[Duration; 3]> {
    let (socket, address) = listener();
    let memory = format!("--max-memory={}mb", (values_bytes >> 20) * 3 / 2);
    let mut old = Server::start(&socket, Role::Serve, &[&memory]);
    let mut client = Client::connect(address);
    let value = "v".repeat(VALUE_BYTES);
    for n in 0..values_bytes / VALUE_BYTES {
        let header = format!("*3\r\n$3\r\nSET\r\n$12\r\nkey:{n:08}\r\n${VALUE_BYTES}\r\n");
        client.write(format!("{header}{value}\r\n").as_bytes());
        assert_eq!(client.line(), "+OK");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let worst = std::thread::spawn({
        let stop = stop.clone();
        let keys = values_bytes / VALUE_BYTES;
        move || longest_gaps(address, keys, &stop)
    });
    let mut steps = Vec::new();
    for _ in 0..MORPHS {
        let mut new = Server::start(&socket, Role::Standby, &[&memory]);
        prepare_by_reference(&mut old, &mut new);
        let begin = Instant::now();
        let frozen = freeze(&mut old);
        let froze = begin.elapsed();
        assert_eq!(activate(&mut new), frozen);
        let activated = begin.elapsed();
        serve(&mut new);
        assert_eq!(client.ask("PING"), "+PONG");
        steps.push([froze, activated, begin.elapsed()]);
        old.retire();
        old = new;
    }
    stop.store(true, Ordering::Relaxed);
    let mut gaps = worst.join().unwrap();
    gaps.sort();
    let tail = &gaps[gaps.len().saturating_sub(MORPHS)..];
    println!(
        "  {} MiB: client at 1 kHz, the {MORPHS} longest answers of {}: median {:?}, longest {:?}",
        values_bytes >> 20,
        gaps.len(),
        tail[tail.len() / 2],
        tail[tail.len() - 1],
    );
    steps
}

/// Writes and reads once a millisecond; how long each answer took.
fn longest_gaps(address: std::net::SocketAddr, keys: usize, stop: &AtomicBool) -> Vec<Duration> {
    let mut client = Client::connect(address);
    let mut times = Vec::new();
    let mut due = Instant::now();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        due += Duration::from_millis(1);
        n = (n + 7919) % keys;
        let begin = Instant::now();
        assert_eq!(
            client.ask(&format!("APPEND key:{n:08} x")).as_bytes()[0],
            b':'
        );
        times.push(begin.elapsed());
    }
    times
}

#[test]
#[ignore = "a measurement: run in release with --nocapture"]
fn freeze_to_first_answer() {
    for mib in [64, 1024] {
        let mut steps = measure(mib << 20);
        for (at, name) in ["frozen", "activated", "first answer"].iter().enumerate() {
            steps.sort_by_key(|step| step[at]);
            let of = |percent: usize| steps[(steps.len() - 1) * percent / 100][at];
            println!(
                "  {mib} MiB: {name} after p50 {:?}, p99 {:?}, max {:?}",
                of(50),
                of(99),
                of(100)
            );
        }
        steps.sort_by_key(|step| step[2]);
        assert!(steps[steps.len() / 2][2] < Duration::from_millis(3));
    }
}
