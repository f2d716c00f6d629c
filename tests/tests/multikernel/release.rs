//! The resources of ended generations are released, even if something blocks the release at first.

use kmorph_control_api::{
    DaemonStatus, ErrorCode, InstanceState, KeptGeneration, Operation, OperationState,
};
use kmorph_emulated_kernel::Generation;
use kmorph_tests::resp::Client;
use kmorph_tests::{Events, Host};
use serde_json::json;

use super::{MORPH, get, instances, pool};

/// Starts a daemon whose instances fail when their kernels end, but not when a busy machine delays their agents.
fn host() -> Option<Host> {
    let config = "[defaults]\nheartbeat_timeout_s = 60.0\n[limits]\nstop_timeout_s = 0.5\n";
    let mut host = Host::prepare_multikernel(Generation::Confirms, config)?;
    host.start();
    Some(host)
}

/// kerf's lock, as left by a killed kerf, until drop.
struct KerfsLock(std::path::PathBuf);

impl KerfsLock {
    fn take(host: &Host) -> Self {
        Self::try_take(host).unwrap()
    }

    /// Returns `None` if another process holds the lock.
    fn try_take(host: &Host) -> Option<Self> {
        let path = host.emulated().beside("run/kerf.lock");
        std::fs::File::create_new(&path).ok()?;
        Some(Self(path))
    }
}

impl Drop for KerfsLock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn kept(host: &Host) -> Vec<KeptGeneration> {
    let daemon: DaemonStatus = host.control().get("/v1/daemon");
    daemon.kept
}

/// Waits until the daemon reports a generation that still holds resources.
fn kept_generation(host: &Host) -> KeptGeneration {
    host.control()
        .wait("a generation to hold something still", || {
            kept(host).into_iter().next()
        })
}

#[test]
fn what_is_terminated_is_gone_only_when_all_is_given_back_and_the_next_daemon_goes_on() {
    let Some(mut host) = host() else { return };
    let whole = pool(&host);
    host.spawn_kv("web");
    let lock = KerfsLock::take(&host);
    let events = Events::follow(host.control());
    let begun = host.control().request("DELETE", "/v1/instances/web", None);
    let begun: Operation = begun.ok();
    let holds = kept_generation(&host);
    assert_eq!((holds.instance.as_str(), holds.generation), ("web", 1));
    assert_eq!((holds.cpus.len(), holds.memory_bytes > 0), (1, true));
    assert!(holds.reason.contains("kerf.lock"), "{holds:?}");
    // The operation is not reported as done.
    let running: Operation = host.control().get(&format!("/v1/operations/{}", begun.id));
    assert_eq!(running.state, OperationState::Running, "{running:?}");
    let shown = host.control().wait("the reason to be shown", || {
        let now = host.control().instance("web");
        now.reason.is_some().then_some(now)
    });
    assert_eq!(shown.summary.state, InstanceState::Terminating);
    assert_eq!(shown.kept.len(), 1);
    assert_eq!(pool(&host).cpus_free.len(), 5, "the pool counts it");
    events.wait("the event", |event| {
        event.message.contains("keeps its CPUs and memory")
    });
    drop(events);

    host.restart_by_kill();
    assert!(kept_generation(&host).reason.contains("kerf.lock"));
    assert_eq!(instances(&host), ["web"]);
    assert_eq!(pool(&host).cpus_free.len(), 5);
    drop(lock);
    host.control().wait("it to be gone", || {
        let gone = host
            .control()
            .request("GET", "/v1/instances/web", None)
            .status;
        (gone == 404).then_some(())
    });
    assert!(instances(&host).is_empty());
    assert_eq!(pool(&host), whole);
    assert!(kept(&host).is_empty());
}

#[test]
fn a_morph_is_done_only_when_the_old_kernel_has_given_all_back_and_its_successor_serves_meanwhile()
{
    let Some(mut host) = host() else { return };
    let port = host.spawn_kv("web");
    Client::connect(port)
        .unwrap()
        .call(&["SET", "k", "v"])
        .unwrap();
    let body = json!({ "kernel": host.kernel("6.12.9-b"), "auto_validate": true, "force": true });
    host.control().succeed("POST", MORPH, Some(&body));
    let lock = KerfsLock::take(&host);
    let body = json!({ "force": true });
    let begun = host
        .control()
        .request("POST", &format!("{MORPH}/commit"), Some(&body));
    let begun: Operation = begun.ok();
    let holds = kept_generation(&host);
    assert_eq!(holds.generation, 1);
    // The successor is the active generation, and can be healed.
    assert_eq!(host.running("web").summary.generation, 2);
    assert_eq!(host.control().instance("web").kept.len(), 1);
    assert_eq!(get(port, "k"), "v");
    let now: Operation = host.control().get(&format!("/v1/operations/{}", begun.id));
    assert_eq!(now.state, OperationState::Running, "{now:?}");
    let ended = host.control().finished(&begun.id);
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let error = ended.error.unwrap();
    assert_eq!(error.code, ErrorCode::OperatorActionNeeded);
    assert!(error.message.contains("generation 1 keeps"), "{error}");
    assert!(
        ended.result.is_some(),
        "the morph is committed all the same"
    );

    host.restart_by_kill();
    assert_eq!(host.running("web").summary.generation, 2);
    assert_eq!(kept_generation(&host).generation, 1);
    drop(lock);
    host.control().wait("all to be given back", || {
        kept(&host).is_empty().then_some(())
    });
    assert_eq!(instances(&host), ["web+b"]);
    assert_eq!(get(port, "k"), "v");
}

#[test]
fn what_a_failed_spawn_could_not_take_back_is_given_back_later() {
    let Some(host) = host() else { return };
    let whole = pool(&host);
    let initramfs = host.path("broken.img");
    std::fs::write(&initramfs, "no archive").unwrap();
    let body = json!({ "name": "web", "kernel": host.kernel("6.1.0-a"), "initramfs": initramfs });
    // The kernel ends during its boot.
    host.emulated().hold_boots(true);
    let begun = host.control().request("POST", "/v1/instances", Some(&body));
    let begun: Operation = begun.ok();
    host.control().wait("the kernel instance to be made", || {
        (instances(&host) == ["web"]).then_some(())
    });
    let lock = host
        .control()
        .wait("kmorph to have given its lock back", || {
            KerfsLock::try_take(&host)
        });
    host.emulated().hold_boots(false);
    let ended = host.control().finished(&begun.id);
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let said = ended.error.unwrap().message;
    assert!(said.contains("something is left"), "{said}");
    let holds = kept_generation(&host);
    assert_eq!((holds.instance.as_str(), holds.generation), ("web", 1));
    assert_eq!(instances(&host), ["web"]);
    drop(lock);
    host.control().wait("all to be given back", || {
        kept(&host).is_empty().then_some(())
    });
    assert!(instances(&host).is_empty());
    assert_eq!(pool(&host), whole);
}

#[test]
fn a_recovery_goes_on_and_what_failed_is_given_back_later() {
    let Some(host) = host() else { return };
    let port = host.spawn_kv("web");
    let lock = KerfsLock::take(&host);
    host.emulated().strike("panic", "web");
    assert_eq!(kept_generation(&host).generation, 1);
    // A successor needs the lock as well.
    drop(lock);
    assert_eq!(host.successor_of("web", 1).summary.generation, 2);
    super::ping(port);
    host.control().wait("all to be given back", || {
        kept(&host).is_empty().then_some(())
    });
    assert_eq!(instances(&host).len(), 1);
    assert_eq!(pool(&host).cpus_free.len(), 5);
}
