//! Device trees: reading, validating and changing a large tree, the time of kerf for the same tasks, and the import of
//! libkerf in Python.

use std::hint::black_box;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use kmorph_tests::kernels;
use libkerf::check::{self, Context};
use libkerf::dtb;
use libkerf::overlay::State;
use libkerf::tree::{DeviceTree, Node};

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};

const GROUP: &str = "trees";

const INSTANCES: u32 = 512;
const CPUS: u64 = 1024;
/// Number of measurements of each figure.
const RUNS: usize = 200;

/// Measures all figures: one minute at most, mostly for kerf.
pub(crate) fn run() -> Found {
    let blob = blob();
    let read = || {
        let tree = dtb::read(black_box(&blob)).expect("it is a tree");
        check::system(&tree, Context::default())
    };
    let (system, report) = read();
    assert!(report.is_valid(), "{report}");
    let reading = milliseconds(|| {
        black_box(read());
    });
    let state = State::new(system);
    let mut after = state.system.clone();
    // Moves one CPU from one instance to another.
    let cpu = after.instances[7].cpus.pop().expect("it has two");
    after.instances[300].cpus.push(cpu);
    let changing = milliseconds(|| {
        let overlay = state.overlay_to(black_box(&after)).expect("it can be");
        black_box(overlay.to_blob().expect("it is small"));
    });
    let of = |name: &str, values| Figure::of(GROUP, name, Unit::Milliseconds, values);
    let best = reading.iter().copied().fold(f64::INFINITY, f64::min);
    let mut figures = vec![
        of("read and judge 512 instances, 1,024 CPUs", reading).bar(Bar::at_most(Of::P99, 5.0)),
        of("overlay for one change in it", changing).bar(Bar::at_most(Of::P99, 1.0)),
    ];
    let mut remarks = vec![format!("trees: the blob has {} bytes", blob.len())];
    match kerf(&blob) {
        Ok((reading, changing)) => {
            let single = |name: &str, unit, value| Figure::single(GROUP, name, unit, value);
            figures.push(single(
                "read and judge it by kerf 0.4.0",
                Unit::Milliseconds,
                reading,
            ));
            figures.push(single(
                "an overlay by kerf, which judges nothing",
                Unit::Milliseconds,
                changing,
            ));
            let ratio = single(
                "kerf's time against ours, to read and judge",
                Unit::Ratio,
                reading / best,
            );
            figures.push(ratio.bar(Bar::at_least(Of::Min, 50.0)));
        }
        Err(error) => remarks.push(format!("trees: not compared with kerf: {error}")),
    }
    let python = crate::python::run(GROUP);
    figures.extend(python.figures);
    remarks.extend(python.remarks);
    Found { figures, remarks }
}

/// Returns a pool of 1,024 CPUs and 512 instances of two CPUs each, with a device for every fourth instance.
fn blob() -> Vec<u8> {
    const MIB: u64 = 1 << 20;
    let cpus: Vec<u64> = (1..=CPUS).map(|n| n * 2).collect();
    let mut resources = Node::new("resources")
        .with_u64_list("cpus", &cpus)
        .with_u64_list("cpus-available", &[])
        .with_child(
            Node::new("memory@100000000")
                .with_u64_list("reg", &[1 << 32, u64::from(INSTANCES) * 68 * MIB])
                .with_u32("numa-node-id", 0),
        );
    let mut devices = Node::new("devices");
    let mut instances = Node::new("instances");
    for (number, own) in (0..INSTANCES).zip(cpus.chunks(2)) {
        let mut own = Node::new("resources")
            .with_u64_list("cpus", own)
            .with_u64("memory-base", (1 << 32) + u64::from(number) * 64 * MIB)
            .with_u64("memory-bytes", 64 * MIB);
        if number % 4 == 0 {
            let name = format!("nic{number}");
            own = own.with_text("device-names", &name);
            devices.push(
                Node::new(name)
                    .with_text("device-type", "pci")
                    .with_text(
                        "pci-id",
                        &format!("0000:{:02x}:{:02x}.0", number / 32, number % 32),
                    )
                    .with_u32("vendor-id", 0x8086)
                    .with_u32("device-id", 0x1572),
            );
        }
        instances.push(
            Node::new(format!("instance-{number}"))
                .with_u32("id", number + 1)
                .with_child(own),
        );
    }
    resources.push(devices);
    let root = Node::new("").with_text("compatible", "multikernel-v1");
    let tree = DeviceTree::new(root.with_child(resources).with_child(instances));
    dtb::write(&tree).expect("it is small enough")
}

fn milliseconds(mut work: impl FnMut()) -> Vec<f64> {
    work();
    let timed = (0..RUNS).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64() * 1e3
    });
    timed.collect()
}

/// Returns the time of kerf, milliseconds: to parse and validate, and to create an overlay.
fn kerf(blob: &[u8]) -> Result<(f64, f64), String> {
    let python = kernels::cache().join("tools/kerf/bin/python");
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../libkerf/tests/beside/time.py");
    let mut process = Command::new(&python)
        .arg("-B")
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| {
            format!(
                "{}: {error}; scripts/fetch-kerf installs it",
                python.display()
            )
        })?;
    if let Some(mut input) = process.stdin.take() {
        input.write_all(blob).map_err(|error| error.to_string())?;
    }
    let output = process
        .wait_with_output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let seconds: Vec<f64> = text
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    match seconds.as_slice() {
        [reading, changing] => Ok((reading * 1e3, changing * 1e3)),
        _ => Err(format!("kerf ended with {}", output.status)),
    }
}
