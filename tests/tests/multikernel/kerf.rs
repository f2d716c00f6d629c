//! kmorph and the real kerf on one kernel: neither takes the other's kernel instances, nor waits for a dead owner's
//! lock.

use kmorph_control_api::{Operation, PoolUsage};
use kmorph_tests::Host;
use serde_json::json;

use super::{host, instances, kerf_does, kernel, ping, pool, run_kerf as kerf};

#[test]
fn what_kerf_made_under_a_name_that_kmorph_was_about_to_use_is_run_as_it_is_and_stays() {
    let Some(mut host) = host() else { return };
    // The lock of a killed kerf, which blocks all other users.
    let lock = host.emulated().beside("run/kerf.lock");
    std::fs::write(&lock, "").unwrap();
    let body = json!({ "name": "web", "kernel": host.kernel("6.1.0-a") });
    let begun = host.control().request("POST", "/v1/instances", Some(&body));
    let _: Operation = begun.ok();
    let record = host.emulated().beside("records/web.json");
    host.control()
        .wait("its record to be written", || record.exists().then_some(()));
    host.kill_daemon();
    assert!(record.exists());
    std::fs::remove_file(&lock).unwrap();
    kerf_does(&host, "create web --cpus=10,12 --memory=512MB");
    let made = kernel(&host).creation("web").unwrap();
    host.start();
    host.running("web");
    assert_eq!(kernel(&host).instance("web").unwrap().cpus, [10, 12]);
    assert_eq!(kernel(&host).creation("web").unwrap(), made);
    host.control().succeed("DELETE", "/v1/instances/web", None);
    assert_eq!(kernel(&host).creation("web").unwrap(), made);
    assert_eq!(instances(&host), ["web"]);
    assert!(!record.exists());
}

#[test]
fn a_record_that_outlived_its_kernel_instance_is_gone_after_the_start() {
    let Some(mut host) = host() else { return };
    host.kill_daemon();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let records = host.emulated().beside("records");
    std::fs::create_dir_all(&records).unwrap();
    let record = |name: &str, boot_id: &str| {
        let record = json!({ "kernel": null, "loaded_at": null, "kmorph": {
            "fenced": false, "generation": 2, "host_boot_id": boot_id, "instance": name,
            "made": true, "run_dir": host.path("run/instances").join(name).join("2"),
        }});
        std::fs::write(records.join(format!("{name}.json")), record.to_string()).unwrap();
    };
    record("s7", boot_id.trim());
    record("s8", "caa14a6e-7410-4359-b925-a6286b94eb7d");
    host.start();
    assert_eq!(std::fs::read_dir(&records).unwrap().count(), 0);
    let log = host.log();
    assert!(log.contains("s7") && log.contains("s8"), "{log}");
}

#[test]
fn a_lock_that_a_killed_daemon_left_does_not_stop_kerf_after_the_next_start() {
    let Some(mut host) = host() else { return };
    host.kill_daemon();
    let lock = host.emulated().beside("run/kerf.lock");
    std::fs::write(&lock, "libkerf pid 1\n").unwrap();
    let refused = kerf(&host, "create db --cpus=16 --memory=256MB").unwrap_err();
    assert!(refused.contains("acquire lock"), "{refused}");
    host.start();
    assert!(!lock.exists());
    kerf_does(&host, "create db --cpus=16 --memory=256MB");
}

#[test]
fn the_daemon_counts_what_kerf_holds() {
    let Some(host) = host() else { return };
    let whole = pool(&host);
    kerf_does(&host, "create db --cpus=14,16 --memory=256MB");
    let left = pool_beside(&host, &[14, 16]);
    assert_eq!(left.cpus_free, [8, 10, 12, 18]);
    // Includes 2 MiB for the kernel.
    assert_eq!(left.memory_besides_bytes, 258 << 20);
    assert_eq!(
        whole.memory_free_bytes - left.memory_free_bytes,
        left.memory_besides_bytes
    );
    // A kernel instance that kerf created and kmorph runs counts as kmorph's, and only once.
    kerf_does(&host, "create web --cpus=10 --memory=512MB");
    let port = host.spawn_kv("web");
    ping(port);
    let now = pool_beside(&host, &[14, 16]);
    assert_eq!(now.cpus_free, [8, 12, 18]);
    kerf_does(&host, "delete db");
    pool_beside(&host, &[]);
}

/// Waits until the daemon reports these CPUs of the pool as held by others, and returns the pool. On a slow machine, a
/// status omits them: the daemon waits at most 0.5 s for the data.
fn pool_beside(host: &Host, cpus: &[u16]) -> PoolUsage {
    host.control().wait("what kerf holds to be counted", || {
        let pool = pool(host);
        (pool.cpus_besides == cpus).then_some(pool)
    })
}
