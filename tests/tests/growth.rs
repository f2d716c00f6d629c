//! A finished morph leaves nothing in the daemon: the short form of `make bench ONLY=growth`, which measures the
//! daemon's memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::path::PathBuf;

use kmorph_tests::Host;

/// Number of morphs before the first count: one-time allocations exist by then.
const BEFORE: usize = 3;
/// Number of morphs between the two counts.
const MORPHS: usize = 20;

/// Targets of the descriptors that the daemon has open: connections, pidfds, listeners, files. A descriptor may be
/// closed while this looks.
fn descriptors(host: &Host) -> Vec<PathBuf> {
    let dir = format!("/proc/{}/fd", host.daemon_pid());
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .collect()
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
    (0..BEFORE).for_each(morph);
    // SQLite keeps one descriptor of the thread that copies the journal, and the source of the last morph has one until
    // its process is gone.
    host.control().wait("the copy of the journal", || {
        host.log().contains("journal copied").then_some(())
    });
    let before = host.control().wait("the last source to be gone", || {
        let now = descriptors(&host);
        let processes = now.iter().filter(|to| to.ends_with("anon_inode:[pidfd]"));
        (processes.count() == 1).then_some(now.len())
    });
    (BEFORE..BEFORE + MORPHS).for_each(morph);
    // The last source is on its way out, and this test's own connection is being closed.
    host.control()
        .wait("the daemon to close what it opened", || {
            (descriptors(&host).len() <= before).then_some(())
        });
}
