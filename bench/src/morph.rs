//! Morphs of the embedded backend, seen by a client that sends a request per millisecond.
//!
//! Windows of equal time alternate: one with a whole morph, one without. The value of each window is the longest gap
//! between two answers that overlaps the window. The gap of a window without a morph is the floor: the delay that this
//! machine causes in any case, including the client's pace of 1 ms. The bars apply to differences of equal quantiles:
//! p50 of the gaps with a morph minus p50 of the gaps without, and likewise p99.

use std::path::Path;
use std::time::{Duration, Instant};

use kmorph_control_api::{DowntimeSteps, EventKind, MorphPhase, MorphStatus, Operation};
use kmorph_tests::resp::{Seen, Steady};
use kmorph_tests::{Events, Host};
use serde_json::json;

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::instances::{fill, image, key_value, port, runs, spawn};

const GROUP: &str = "morph";
/// Name of the instance that is morphed.
pub(crate) const NAME: &str = "web";
/// Interval between two requests of the client.
const PACE: Duration = Duration::from_millis(1);
/// Number of a daemon's first sessions whose estimates are not judged, because the daemon still learns the machine's
/// speed.
const LEARNING: u64 = 5;
/// Memory of a server besides its values, MiB: keys, and pages that are not full.
const MARGIN_MIB: usize = 512;

/// The times of the windows of a run.
#[derive(Default)]
struct Windows {
    morphs: Vec<(Instant, Instant)>,
    quiet: Vec<(Instant, Instant)>,
    ended: Vec<MorphStatus>,
}

/// Measures `morphs` morphs for each size of the values, in MiB.
pub(crate) fn run(morphs: usize, sizes_mib: &[usize]) -> Found {
    let mut found = Found::default();
    for &size in sizes_mib {
        let (windows, seen) = measure(size, morphs);
        found.figures.extend(figures(size, &windows, &seen));
        found.remarks.push(remark(size, &windows, &seen));
    }
    found
}

fn measure(size_mib: usize, morphs: usize) -> (Windows, Seen) {
    let memory = size_mib + MARGIN_MIB;
    let host = Host::with(&format!(
        "[defaults]\nmemory_mib = {memory}\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n"
    ));
    let kernels = [image(&host, "6.1.0-a"), image(&host, "6.12.0-b")];
    let events = Events::follow(host.control());
    let limit = format!("--max-memory={memory}mb");
    spawn(&host, &events, &key_value(NAME, &kernels[0], &[&limit]));
    let port = port(&host, NAME);
    fill(port, size_mib << 20);
    let client = Steady::start(port, PACE);
    // The first answers are late, because the connection is new.
    std::thread::sleep(PACE * 100);
    let mut windows = Windows::default();
    for n in 0..morphs {
        let (begin, end, operation) = morph(&host, &events, &kernels[(n + 1) % 2], false);
        windows.morphs.push((begin, end));
        windows.ended.push(committed(&host, &operation));
        let quiet = Instant::now();
        std::thread::sleep(end - begin);
        windows.quiet.push((quiet, quiet + (end - begin)));
    }
    (windows, client.stop())
}

/// Runs one morph, from its request until the instance runs in a later generation; also returns the ID of the
/// operation.
pub(crate) fn morph(
    host: &Host,
    events: &Events,
    kernel: &Path,
    force: bool,
) -> (Instant, Instant, String) {
    let now = host.control().instance(NAME).summary.generation;
    let body =
        json!({ "kernel": kernel, "auto_validate": true, "auto_commit": true, "force": force });
    let begin = Instant::now();
    let path = format!("/v1/instances/{NAME}/morph");
    let begun: Operation = host.control().request("POST", &path, Some(&body)).ok();
    let end = events.wait("a morph to end", |event| {
        let failed = event.kind == EventKind::Morph && event.message.contains("rolled back");
        assert!(!failed, "{}", event.message);
        runs(event, NAME, now + 1)
    });
    (begin, end.at, begun.id)
}

/// Returns the morph of `operation`, which must be committed.
pub(crate) fn committed(host: &Host, operation: &str) -> MorphStatus {
    let ended = host.control().finished(operation);
    let result = ended.result.expect("a morph has a result");
    let status: MorphStatus = serde_json::from_value(result).expect("a morph's status");
    assert_eq!(status.phase, MorphPhase::Committed, "{status:?}");
    status
}

fn figures(size: usize, windows: &Windows, seen: &Seen) -> Vec<Figure> {
    let longest = |windows: &[(Instant, Instant)]| -> Vec<Duration> {
        let gap = |(from, to): &(Instant, Instant)| seen.longest_gap_between(*from, *to);
        windows.iter().map(gap).collect()
    };
    let name = |what: &str| format!("{what}, {size} MiB");
    let with = Figure::times(
        GROUP,
        name("client's longest gap, with a morph"),
        longest(&windows.morphs),
    );
    let without = Figure::times(
        GROUP,
        name("client's longest gap, without"),
        longest(&windows.quiet),
    );
    let above = |what: &str, value: f64, limit: f64| {
        Figure::single(GROUP, name(what), Unit::Milliseconds, value)
            .bar(Bar::at_most(Of::Max, limit))
    };
    #[allow(
        clippy::cast_precision_loss,
        reason = "a count of failures, far below 2^52"
    )]
    let failed = (seen.failed + seen.wrong) as f64;
    let took = windows.morphs.iter().map(|(begin, end)| *end - *begin);
    let mut figures = vec![
        above(
            "p50 of the gaps above p50 without",
            with.p50() - without.p50(),
            3.0,
        ),
        above(
            "p99 of the gaps above p99 without",
            with.p99() - without.p99(),
            10.0,
        ),
        Figure::single(GROUP, name("requests that failed"), Unit::Times, failed)
            .bar(Bar::at_most(Of::Max, 0.0)),
        with,
        without,
        Figure::times(GROUP, name("a whole morph"), took),
    ];
    figures.extend(downtime(GROUP, &windows.ended, name));
    figures
}

/// Returns the figures of the downtime, of its steps, and of the error of its estimate.
pub(crate) fn downtime(
    group: &'static str,
    ended: &[MorphStatus],
    name: impl Fn(&str) -> String,
) -> Vec<Figure> {
    let steps: Vec<_> = ended.iter().filter_map(|m| m.downtime.clone()).collect();
    let figure = |what: &str, step: fn(&DowntimeSteps) -> u64| {
        let times = steps.iter().map(|s| Duration::from_micros(step(s)));
        Figure::times(group, name(what), times)
    };
    vec![
        figure("downtime, as the daemon saw it", |s| s.total_us),
        figure("… freeze", |s| s.freeze_us),
        figure("… final delta", |s| s.final_delta_us),
        figure("… activate", |s| s.activate_us),
        figure("… commit record", |s| s.record_us),
        figure("… serve", |s| s.serve_us),
        Figure::of(
            group,
            name("the larger of downtime and estimate, against the smaller"),
            Unit::Ratio,
            ended
                .iter()
                .filter(|morph| morph.session > LEARNING)
                .filter_map(estimate_off_by)
                .collect(),
        )
        .bar(Bar::at_most(Of::P50, 2.0)),
    ]
}

/// Returns the factor by which the estimate was too high or too low.
#[allow(
    clippy::cast_precision_loss,
    reason = "microseconds of a morph, far below 2^52"
)]
fn estimate_off_by(morph: &MorphStatus) -> Option<f64> {
    let estimate = morph.estimated_downtime_us? as f64;
    let ratio = morph.downtime.as_ref()?.total_us as f64 / estimate;
    Some(ratio.max(1.0 / ratio))
}

fn remark(size: usize, windows: &Windows, seen: &Seen) -> String {
    let failure = seen.first_failure.as_deref().unwrap_or("none");
    format!(
        "morph, {size} MiB: {} morphs, {} requests answered, {} failed, {} with a wrong answer; first failure: {failure}",
        windows.morphs.len(),
        seen.answered,
        seen.failed,
        seen.wrong
    )
}
