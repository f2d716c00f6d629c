//! The disk of the journal. Full: no change is possible, everything that runs keeps running, and when space is
//! available again, the daemon continues on its own. Read-only: the daemon does not start.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::io::Write;
use std::path::{Path, PathBuf};

use kmorph_control_api::{DaemonStatus, ErrorCode, EventKind, InstanceSummary};
use kmorph_tests::{Events, Host};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use serde_json::json;

const DISK: &str = "mode=0700,size=4m";

/// A small file system that only this thread and its children see.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: PathBuf) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(DISK),
        )
        .unwrap();
        Self(path)
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        for size in [4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(none, Path::new("/"), none, private, none).unwrap();
}

/// Starts a daemon whose state is on a small disk. In this order of the bindings, the disk is dropped first.
fn on_a_small_disk() -> (Host, Disk) {
    own_mounts();
    let mut host = Host::prepare(
        "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n",
    );
    let disk = Disk::mount(host.path("state"));
    host.start();
    (host, disk)
}

fn daemon(host: &Host) -> DaemonStatus {
    host.control().get("/v1/daemon")
}

#[test]
fn a_full_disk_refuses_changes_and_stops_nothing() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can mount a small disk to fill");
        return;
    }
    let (host, disk) = on_a_small_disk();
    host.spawn_bare("web");
    let agent = host.agent("web");
    assert!(daemon(&host).journal_ok);
    disk.fill();
    let patch = json!({ "morph_timeout_s": 7.0 });
    // The journal has a little room left in the pages of its log.
    let error = host.control().wait("the disk to be full", || {
        let path = "/v1/instances/web/policy";
        let reply = host.control().request("PATCH", path, Some(&patch));
        (reply.status >= 400).then(|| reply.refusal())
    });
    assert_eq!(error.code, ErrorCode::JournalUnavailable, "{error:?}");
    assert!(error.message.contains("disk is full"), "{error:?}");
    let body = json!({ "name": "db", "kernel": host.kernel("6.1.0-a") });
    let spawn = host.control().request("POST", "/v1/instances", Some(&body));
    assert_eq!(spawn.refusal().code, ErrorCode::JournalUnavailable);
    let end = host.control().request("DELETE", "/v1/instances/web", None);
    assert_eq!(end.refusal().code, ErrorCode::JournalUnavailable);
    // Another daemon could not finish the recovery.
    let recover = host
        .control()
        .request("POST", "/v1/instances/web/recover", None);
    assert_eq!(recover.refusal().code, ErrorCode::JournalUnavailable);
    let all: Vec<InstanceSummary> = host.control().get("/v1/instances");
    assert_eq!(all.len(), 1, "nothing was begun: {all:?}");
    let now = daemon(&host);
    assert!(!now.journal_ok);
    assert!(now.journal_error.unwrap().contains("disk is full"));
    assert_eq!(host.running("web").processes["agent"], agent);
    // With space available again, the next write succeeds.
    std::fs::remove_file(disk.filler()).unwrap();
    let path = "/v1/instances/web/policy";
    let reply = host.control().request("PATCH", path, Some(&patch));
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(daemon(&host).journal_ok);
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    host.successor_of("web", 1);
}

#[test]
fn an_instance_that_dies_while_the_disk_is_full_is_healed_when_there_is_space() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can mount a small disk to fill");
        return;
    }
    own_mounts();
    let mut host =
        Host::prepare("[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n");
    let disk = Disk::mount(host.path("state"));
    host.start();
    host.spawn_bare("web");
    disk.fill();
    let events = Events::follow(host.control());
    kill(Pid::from_raw(host.agent("web")), Signal::SIGKILL).unwrap();
    events.wait("its verdict", |event| event.kind == EventKind::Detector);
    host.control().wait("the journal to be refused", || {
        (!daemon(&host).journal_ok).then_some(())
    });
    std::fs::remove_file(disk.filler()).unwrap();
    host.successor_of("web", 1);
}

#[test]
fn a_disk_that_is_full_at_the_start_is_said() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can mount a small disk to fill");
        return;
    }
    own_mounts();
    let host = Host::prepare("");
    let disk = Disk::mount(host.path("state"));
    disk.fill();
    let text = host.refused_start(&[]);
    assert!(text.contains("disk is full"), "{text}");
}

#[test]
fn a_read_only_state_directory_is_refused_at_the_start() {
    let host = Host::prepare("");
    let state = host.path("state");
    // Root can write regardless of permissions, so for root the file system is read-only.
    let _disk = Uid::effective().is_root().then(|| {
        own_mounts();
        let disk = Disk::mount(state.clone());
        let again = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &state, None::<&str>, again, None::<&str>).unwrap();
        disk
    });
    std::fs::create_dir_all(&state).unwrap();
    if !Uid::effective().is_root() {
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o555);
        std::fs::set_permissions(&state, closed).unwrap();
    }
    let text = host.refused_start(&[]);
    for words in [state.to_str().unwrap(), "must be writable"] {
        assert!(text.contains(words), "{text}");
    }
    assert!(!host.path("run/kmorphd.sock").exists());
}

/// Requires a debug build of the daemon: a release build has no such fault.
#[cfg(debug_assertions)]
#[test]
fn an_instance_whose_actor_panics_while_the_disk_is_full_is_watched_again_when_there_is_space() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can mount a small disk to fill");
        return;
    }
    let (host, disk) = on_a_small_disk();
    host.spawn_bare("web");
    let agent = host.agent("web");
    disk.fill();
    let patch = |host: &Host| {
        let patch = json!({ "morph_timeout_s": 7.0 });
        let path = "/v1/instances/web/policy";
        host.control().request("PATCH", path, Some(&patch)).status
    };
    host.control().wait("the disk to be full", || {
        (patch(&host) >= 400).then_some(())
    });
    host.panic_at("instance", || {
        patch(&host);
    });
    host.control().wait("the daemon to say so", || {
        host.log()
            .contains("unwatched until the journal can be read")
            .then_some(())
    });
    std::fs::remove_file(disk.filler()).unwrap();
    host.control().wait("it to be watched", || {
        let reply = host.control().request("GET", "/v1/instances/web", None);
        (reply.status == 200).then_some(())
    });
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    host.successor_of("web", 1);
}
