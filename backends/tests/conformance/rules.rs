//! The rules of the contract, one function each. `contract/mod.rs` has the text of the rules.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use kmorph_backends::contract::{
    BackendKind, Endpoint, ExitCause, HostListener, Observation, Placement, SpawnError,
};
use kmorph_backends::key::KEY_FILE;
use kmorph_launch::PublishedPort;
use kmp_proto::fence::{Confirmation, FenceMethod, FenceOrder};
use kmp_transport::link::BoxedLink;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::ground::Ground;

const PORT: u16 = 6379;
/// Number of answers of an agent while other connections are given up.
const ANSWERS: usize = 20;
/// Time for which `ended` on another backend's placement must not return.
const FOREIGN_WATCHED: Duration = Duration::from_millis(200);
/// Interval between given-up connections: a boot in software emulation keeps a CPU busy by itself.
const GIVEN_UP_EVERY: Duration = Duration::from_micros(500);

/// Returns the session of a process; 0 if its leader is outside this PID namespace, which `getsid` of rustix cannot
/// represent. See proc_pid_stat(5).
fn session_of(pid: impl std::fmt::Display) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, after_name) = stat.rsplit_once(") ").unwrap();
    let session = after_name.split(' ').nth(3).unwrap();
    session.parse().unwrap()
}

async fn ended(ground: &Ground, placement: &Placement) -> ExitCause {
    ground
        .in_time(ground.backend.ended(placement), "the end")
        .await
}

/// Rule 1: the placement is complete, and the instance's processes have sessions of their own.
pub(crate) async fn a_spawned_instance_is_reached_and_outlives_its_daemon(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let seen = ground.backend.observe(&placement).await.unwrap();
    assert_eq!(seen, Observation::Running);
    let ours = session_of(std::process::id());
    for process in &placement.processes {
        let session = session_of(process.pid);
        assert_ne!(session, ours, "{process:?} ends with the daemon's terminal");
    }
    ground.fence(&placement).await;
}

/// Rules 2 and 3: a placement is plain data, and `find` returns it again if it was never recorded.
pub(crate) async fn a_placement_is_all_that_another_daemon_needs(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let other = ground.another_daemon();
    let find = |name: &str, generation| {
        let (other, dir) = (other.clone(), placement.run_dir.clone());
        let name = name.parse().unwrap();
        async move { other.find(&name, generation, &dir).await.unwrap() }
    };
    let found = find("web", placement.generation).await.unwrap();
    assert_eq!(found, placement);
    assert_eq!(find("web", placement.generation + 1).await, None);
    assert_eq!(find("other", placement.generation).await, None);
    let text = serde_json::to_string(&placement).unwrap();
    let read: Placement = serde_json::from_str(&text).unwrap();
    let seen = other.observe(&read).await.unwrap();
    assert_eq!(seen, Observation::Running);
    let order = FenceOrder::new(read.generation);
    let proof = other.fence(&read, order).await.unwrap().certificate;
    assert_eq!(proof.method(), ground.stops_by());
    let found = find("web", placement.generation).await;
    // A kernel beside the host's holds its resources until the release.
    assert_eq!(found.is_some(), ground.emulated.is_some(), "{found:?}");
    other.release(&read, &proof).await.unwrap();
    assert_eq!(find("web", placement.generation).await, None);
}

pub(crate) async fn an_end_is_seen_with_its_cause(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let killed = ground.kill(&placement);
    assert_eq!(ended(ground, &placement).await, killed);
    let seen = ground.backend.observe(&placement).await.unwrap();
    assert_eq!(seen, Observation::Ended(killed));
    // Rule 4: the fence of an ended generation is confirmed in the same way.
    let proof = ground.fence(&placement).await;
    assert_eq!(proof.confirmation(), ground.confirms_by());
}

pub(crate) async fn a_stopped_instance_is_seen_and_can_be_fenced(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let seen_as = ground.stop(&placement);
    let stopped = async {
        while ground.backend.observe(&placement).await.unwrap() != seen_as {
            tokio::time::sleep(GIVEN_UP_EVERY).await;
        }
    };
    ground.in_time(stopped, "the stop").await;
    // A stopped instance is not waited for.
    assert!(!ground.backend.save_registers(&placement).await.unwrap());
    let proof = ground.fence(&placement).await;
    assert_eq!(proof.method(), ground.stops_by());
    assert!(!ground.lives(&placement));
}

/// Rule 7. A backend that cannot freeze returns an error, and its instance runs on.
pub(crate) async fn a_frozen_instance_stands_still_until_it_is_resumed(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let observed = || async { ground.backend.observe(&placement).await.unwrap() };
    match ground.backend.freeze(&placement).await {
        Err(error) => assert_eq!(error.source.kind(), ErrorKind::Unsupported, "{error}"),
        Ok(frozen) => {
            assert!(frozen);
            assert_eq!(observed().await, Observation::Stopped);
            // A frozen instance is not frozen again; another daemon can resume it, also repeatedly.
            assert!(!ground.backend.freeze(&placement).await.unwrap());
            let other = ground.another_daemon();
            other.resume(&placement).await.unwrap();
            other.resume(&placement).await.unwrap();
        }
    }
    assert_eq!(observed().await, Observation::Running);
    ground.answers(&placement).await;
    ground.fence(&placement).await;
    // A resume does not undo an end.
    let _ = ground.backend.resume(&placement).await;
    assert!(matches!(observed().await, Observation::Ended(_)));
}

pub(crate) async fn it_ends_by_itself_when_it_is_asked_to(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    ground.backend.request_shutdown(&placement).await.unwrap();
    let cause = ended(ground, &placement).await;
    let orderly = matches!(
        cause,
        ExitCause::Exited {
            status: None | Some(0)
        }
    );
    assert!(orderly, "{cause:?}");
    // A shutdown request to an ended instance is not an error.
    ground.fence(&placement).await;
    ground.backend.request_shutdown(&placement).await.unwrap();
}

/// Rules 4, 5 and 6.
pub(crate) async fn a_fence_is_confirmed_and_can_be_repeated(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    let proof = ground.fence(&placement).await;
    assert_eq!(proof.generation(), placement.generation);
    assert_eq!(proof.method(), ground.stops_by());
    assert!(!ground.lives(&placement));
    let again = ground.fence(&placement).await;
    assert_eq!(again.method(), FenceMethod::AlreadyEnded);
    let order = FenceOrder::new(placement.generation + 1);
    let another = ground.backend.fence(&placement, order).await.unwrap_err();
    assert_eq!(another.order.generation(), placement.generation + 1);

    // The key file shows others that the directory is in use.
    let key = placement.run_dir.join(KEY_FILE);
    assert!(key.exists(), "its key is gone before the release");
    let order = FenceOrder::new(placement.generation + 1);
    let stranger = order.confirm(FenceMethod::NeverStarted, Confirmation::NothingFound, 1);
    assert!(ground.backend.release(&placement, &stranger).await.is_err());
    for _ in 0..2 {
        ground.backend.release(&placement, &proof).await.unwrap();
        if let Endpoint::Unix { path } = &placement.endpoint {
            assert!(!path.exists(), "its socket is left");
        }
        assert!(!key.exists(), "its key is left");
    }
    assert!(placement.run_dir.exists(), "its logs are gone");
}

/// Rule 2: a PID with another start time belongs to a foreign process, even if the process leads a session.
pub(crate) async fn a_reused_pid_is_never_mistaken_for_the_instance(ground: &Ground) {
    let mut placement = ground.spawn(ground.spec()).await;
    ground.fence(&placement).await;
    let mut stranger = Command::new("setsid")
        .args(["sleep", "600"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let pid = i32::try_from(stranger.id()).unwrap();
    let leads = async {
        while session_of(pid) != pid {
            tokio::time::sleep(GIVEN_UP_EVERY).await;
        }
    };
    ground.in_time(leads, "the stranger's session").await;
    for process in &mut placement.processes {
        process.pid = pid;
        // A tick is 10 ms: both may have started in the same tick, which is impossible for a reused PID.
        process.start_ticks -= 1;
    }
    let other = ground.another_daemon();
    let seen = other.observe(&placement).await.unwrap();
    let order = FenceOrder::new(placement.generation);
    let proof = other.fence(&placement, order).await.unwrap().certificate;
    let lives = stranger.try_wait().unwrap().is_none();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert!(lives, "a stranger's process was killed");
    assert!(matches!(seen, Observation::Ended(_)), "{seen:?}");
    assert_eq!(proof.method(), FenceMethod::AlreadyEnded);
}

pub(crate) async fn a_refused_spawn_leaves_nothing(ground: &Ground) {
    let mut spec = ground.spec();
    let run_dir = spec.run_dir.clone();
    spec.workload = Some(kmorph_launch::WorkloadSpec {
        program: "/nonexistent/program".into(),
        ..ground.kv()
    });
    let error = ground.backend.spawn(spec).await.unwrap_err();
    assert!(matches!(error, SpawnError::Refused(_)), "{error:?}");
    assert!(
        error.to_string().contains("/nonexistent/program"),
        "{error}"
    );
    assert!(ground.processes_of(&run_dir).is_empty());
    let name = "web".parse().unwrap();
    let found = ground.backend.find(&name, 1, &run_dir).await.unwrap();
    assert_eq!(found, None);
}

pub(crate) async fn a_published_port_reaches_the_workload(ground: &Ground) {
    let mut spec = ground.spec();
    let port = PublishedPort {
        port: PORT,
        name: format!("port-{PORT}"),
    };
    spec.workload = Some(ground.kv());
    spec.ports = vec![port.clone()];
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    if ground.backend.passes_sockets() {
        let socket = OwnedFd::from(listener);
        spec.listeners = vec![HostListener { port, socket }];
    }
    let placement = ground.spawn(spec).await;
    let mut client: BoxedLink = if ground.backend.passes_sockets() {
        Box::new(tokio::net::TcpStream::connect(address).await.unwrap())
    } else {
        ground.port(&placement, u32::from(PORT)).await
    };
    client.write_all(b"PING\r\n").await.unwrap();
    let mut answer = [0; 7];
    let read = client.read_exact(&mut answer);
    let answered = ground.in_time(read, "an answer of the workload").await;
    answered.unwrap();
    assert_eq!(&answer, b"+PONG\r\n");
    ground.fence(&placement).await;
}

/// Rule 4: a process whose first thread has ended while others run has not ended, although its entry in `/proc` shows a
/// zombie.
pub(crate) async fn threads_that_outlive_their_first_one_are_fenced(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.fence(&placement).await;
    let code = "import ctypes, threading, time\n\
                threading.Thread(target=time.sleep, args=(600,)).start()\n\
                ctypes.CDLL(None).pthread_exit(None)";
    let mut headless = Command::new("python3")
        .args(["-c", code])
        .env("KMORPH_FENCE", &placement.run_dir)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let pid = i32::try_from(headless.id()).unwrap();
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let zombie = async {
        while !stat().contains(") Z ") {
            tokio::time::sleep(GIVEN_UP_EVERY).await;
        }
    };
    ground.in_time(zombie, "the end of the first thread").await;
    let proof = ground.fence(&placement).await;
    let ended = headless.try_wait();
    let _ = headless.kill();
    let _ = headless.wait();
    assert_eq!(proof.method(), FenceMethod::ProcessesKilled);
    assert!(!matches!(ended, Ok(None)), "it runs behind a certificate");
}

/// Rule 4: the position of the mark in an environment does not matter.
pub(crate) async fn a_mark_behind_a_large_environment_is_found(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.fence(&placement).await;
    let mut marked = Command::new("sleep");
    marked.arg("600").stdin(Stdio::null()).env_clear();
    // Variables are passed in the order of their names, each within the kernel's limit.
    for before in ["A1", "A2", "A3", "A4"] {
        marked.env(before, "x".repeat(100_000));
    }
    marked.env("KMORPH_FENCE", &placement.run_dir);
    let mut marked = marked.spawn().unwrap();
    let proof = ground.fence(&placement).await;
    let ended = marked.try_wait();
    let _ = marked.kill();
    let _ = marked.wait();
    assert_eq!(proof.method(), FenceMethod::ProcessesKilled);
    assert!(!matches!(ended, Ok(None)), "it runs behind a certificate");
}

/// Rule 2: connections of a killed daemon do not disturb the next one, at any moment of a boot.
pub(crate) async fn connections_that_are_given_up_do_no_harm(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    let Endpoint::Unix { path } = placement.endpoint.clone() else {
        // An address of the host's own kernel, which manages its sockets itself.
        return;
    };
    let killed = tokio::spawn(async move {
        loop {
            if let Ok(mut socket) = UnixStream::connect(&path).await {
                let _ = socket.write_all(b"CONNECT 9000\n").await;
            }
            tokio::time::sleep(GIVEN_UP_EVERY).await;
        }
    });
    ground.answers(&placement).await;
    // Also while the instance serves.
    for _ in 0..ANSWERS {
        ground.answers(&placement).await;
    }
    killed.abort();
    ground.answers(&placement).await;
    ground.fence(&placement).await;
}

/// Rule 8.
pub(crate) async fn nothing_that_was_lent_is_nothing_to_take_back(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    assert_eq!(ground.backend.lend(&placement, &[]).await.unwrap(), None);
    ground.backend.take_back(&placement).await.unwrap();
    ground.fence(&placement).await;
    ground.backend.take_back(&placement).await.unwrap();
}

/// Rule 9: a backend makes no statement about a generation of another backend.
pub(crate) async fn a_placement_of_another_backend_is_refused_and_left_alone(ground: &Ground) {
    let placement = ground.spawn(ground.spec()).await;
    ground.answers(&placement).await;
    let mut foreign = placement.clone();
    foreign.backend = match placement.backend {
        BackendKind::Embedded => BackendKind::Qemu,
        BackendKind::Qemu | BackendKind::Multikernel => BackendKind::Embedded,
    };
    // The other backend would find no process by the names that it knows.
    foreign.processes.clear();
    let backend = &ground.backend;
    let observed = backend.observe(&foreign).await.unwrap_err();
    assert_eq!(
        observed.source.kind(),
        ErrorKind::InvalidInput,
        "{observed}"
    );
    let order = FenceOrder::new(placement.generation);
    let unconfirmed = backend.fence(&foreign, order).await.unwrap_err();
    assert!(
        unconfirmed.reason.contains("backend runs it"),
        "{unconfirmed}"
    );
    assert!(backend.request_shutdown(&foreign).await.is_err());
    let waited = tokio::time::timeout(FOREIGN_WATCHED, backend.ended(&foreign));
    assert!(waited.await.is_err(), "it was called ended");
    ground.answers(&placement).await;
    let proof = ground.fence(&placement).await;
    assert!(backend.release(&foreign, &proof).await.is_err());
    backend.release(&placement, &proof).await.unwrap();
}
