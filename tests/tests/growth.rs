//! A finished morph leaves nothing in the daemon: the short form of `make bench ONLY=growth`, which measures the
//! daemon's memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use kmorph_tests::Host;

/// Number of morphs before the first measurement: one-time allocations exist by then.
const BEFORE: usize = 3;
/// Number of morphs after the first measurement.
const MORPHS: usize = 20;

/// Returns the number of the daemon's open descriptors: connections, pidfds, listeners, files.
fn descriptors(host: &Host) -> usize {
    let dir = format!("/proc/{}/fd", host.daemon_pid());
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn descriptors_are_as_many_after_many_morphs_as_after_a_few() {
    let host = Host::with(
        "[defaults]\nheartbeat_timeout_s = 20.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let kernels = ["6.1.0-a", "6.12.0-b"].map(|release| host.kernel(release));
    host.spawn_kv("web");
    let morph = |n: usize| {
        host.running("web");
        let ended = host.control().morph("web", &kernels[(n + 1) % 2]);
        assert!(ended.error.is_none(), "{ended:?}");
    };
    // The old generation may still be ending, and this test's own connection may still be closing.
    let settled = |most: usize| {
        host.control().wait("the daemon to be done", || {
            let now = descriptors(&host);
            (now <= most).then_some(now)
        })
    };
    (0..BEFORE).for_each(morph);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = settled(usize::MAX);
    (BEFORE..BEFORE + MORPHS).for_each(morph);
    settled(before);
}
