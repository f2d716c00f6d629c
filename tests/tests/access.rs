//! Access rights: the daemon's files belong to its owner, planted files are refused, a caller's descriptors stay with
//! the caller, and no user can lock root out.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kmorph_control_api::{InstanceSummary, OperationState};
use kmorph_tests::{DEADLINE, Host, program};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::unistd::{Pid, Uid};
use serde_json::json;

const SECRET: &str = "correct-horse-battery-staple";
/// A user with read access only.
const NOBODY: u32 = 65_534;
const SOUND: &str = "[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Returns everything below a directory, without entries that vanish meanwhile.
fn below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.append(&mut below(&entry.path()));
        }
    }
    found
}

/// Returns `kmorphctl daemon start`; `host` does not track that daemon.
fn start_by_kmorphctl(host: &Host) -> Command {
    let mut command = Command::new(program("kmorphctl"));
    command
        .args(["daemon", "start", "--config"])
        .arg(host.config_path())
        .env("KMORPH_SOCKET", host.path("run/kmorphd.sock"))
        .stdout(Stdio::null());
    command
}

/// Ends a daemon that `host` does not track.
fn end_daemon(host: &Host) {
    let daemon: kmorph_control_api::DaemonStatus = host.control().get("/v1/daemon");
    let pid = i32::try_from(daemon.pid).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
}

#[test]
fn what_the_daemon_writes_is_for_its_owner_only_and_a_secret_goes_with_its_instance() {
    let host = Host::prepare(SOUND);
    let mut command = start_by_kmorphctl(&host);
    let permissive = || {
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        Ok(())
    };
    // SAFETY: the closure makes one system call between fork and exec.
    unsafe { command.pre_exec(permissive) };
    assert!(command.status().unwrap().success());
    assert_eq!(mode(&host.path("state/kmorphd.log")), 0o600);
    let body = json!({
        "name": "web", "kernel": host.kernel("6.1.0-a"),
        "workload": { "program": "kmorph-kv", "env": { "TOKEN": SECRET } },
    });
    host.control().succeed("POST", "/v1/instances", Some(&body));
    host.running("web");
    assert_eq!(mode(&host.path("state")), 0o700);
    assert_eq!(mode(&host.path("run/instances")), 0o700);
    let state = below(&host.path("state"));
    let log = host.path("run/instances/web/1/agent.log");
    let config = host.path("run/instances/web/1/agent.json");
    for path in state.iter().chain([&log, &config]) {
        assert_eq!(mode(path) & 0o077, 0, "{path:?} has mode {:o}", mode(path));
    }
    let holds = |path: &PathBuf| {
        let bytes = fs::read(path).unwrap_or_default();
        bytes.windows(SECRET.len()).any(|w| w == SECRET.as_bytes())
    };
    host.control().wait("a copy of the journal", || {
        let copies = fs::read_dir(host.path("state/backups")).ok()?.flatten();
        let mut copies = copies.map(|entry| entry.path());
        copies.find(|path| path.extension().is_some() && holds(path))
    });
    host.control().succeed("DELETE", "/v1/instances/web", None);
    host.control().wait("the secret to be overwritten", || {
        let left = [below(&host.path("state")), below(&host.path("run"))].concat();
        (!left.iter().any(holds)).then_some(())
    });
    end_daemon(&host);
}

#[test]
fn a_runtime_directory_of_another_user_is_refused() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can give a directory away");
        return;
    }
    for name in ["run", "state"] {
        let host = Host::prepare(SOUND);
        let theirs = host.path(name);
        fs::create_dir(&theirs).unwrap();
        fs::set_permissions(&theirs, fs::Permissions::from_mode(0o755)).unwrap();
        chown(&theirs, Some(NOBODY), None).unwrap();
        let text = host.refused_start(&[]);
        for words in ["uid 65534", "chown", theirs.to_str().unwrap()] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}

#[test]
fn a_planted_configuration_of_an_agent_is_not_written_through() {
    let host = Host::with(SOUND);
    let precious = host.path("precious");
    fs::write(&precious, "precious").unwrap();
    let run_dir = host.path("run/instances/web/1");
    fs::create_dir_all(&run_dir).unwrap();
    for dir in [run_dir.clone(), host.path("run/instances/web")] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    symlink(&precious, run_dir.join("agent.json")).unwrap();
    let body = json!({ "name": "web", "kernel": host.kernel("6.1.0-a") });
    let ended = host.control().operate("POST", "/v1/instances", Some(&body));
    assert_eq!(ended.state, OperationState::Failed, "{ended:?}");
    let error = ended.error.unwrap();
    assert!(error.message.contains("symbolic link"), "{error}");
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
    // The daemon does not append its log to such a file, either.
    let host = Host::prepare(SOUND);
    fs::create_dir(host.path("state")).unwrap();
    fs::set_permissions(host.path("state"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink(&precious, host.path("state/kmorphd.log")).unwrap();
    let started = start_by_kmorphctl(&host).output().unwrap();
    let text = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(
        !started.status.success() && text.contains("symbolic link"),
        "{text}"
    );
}

/// Returns the targets of a process's descriptors.
fn descriptors(pid: i32) -> Vec<String> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let target = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
    let mut all: Vec<_> = links
        .filter_map(|entry| Some(target(entry.unwrap())?.display().to_string()))
        .collect();
    all.sort();
    all
}

/// Returns the first child of a process.
fn child_of(pid: i32) -> Option<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(path).unwrap();
    text.split_whitespace().next()?.parse().ok()
}

#[test]
fn a_callers_descriptors_reach_neither_daemon_nor_agent_nor_workload() {
    for by_kmorphctl in [false, true] {
        let mut host = Host::prepare(SOUND);
        let lock = host.path("deploy.lock");
        let file = fs::File::create(&lock).unwrap();
        let numbers: Vec<_> = (0..20)
            .map(|_| {
                let own = file.try_clone().unwrap();
                fcntl(&own, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
                own
            })
            .collect();
        if by_kmorphctl {
            assert!(start_by_kmorphctl(&host).status().unwrap().success());
        } else {
            host.start();
        }
        // Closed before another test's process inherits them.
        drop(numbers);
        let daemon: kmorph_control_api::DaemonStatus = host.control().get("/v1/daemon");
        let daemon = i32::try_from(daemon.pid).unwrap();
        let body = json!({
            "name": "web", "kernel": host.kernel("6.1.0-a"),
            "workload": { "program": "/bin/sleep", "args": ["infinity"] },
        });
        host.control().succeed("POST", "/v1/instances", Some(&body));
        let agent = host.agent("web");
        let workload = host.control().wait("the workload", || {
            child_of(agent).filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "sleep\n")
            })
        });
        for pid in [daemon, agent, workload] {
            let open = descriptors(pid);
            let inherited = open.iter().filter(|d| **d == *lock.to_str().unwrap());
            assert_eq!(inherited.count(), 0, "{pid}: {open:?}");
        }
        // The standard streams of the workload, and the socket to its agent.
        let open = descriptors(workload);
        assert_eq!(open.len(), 4, "{open:?}");
        let kinds: BTreeSet<_> = open.iter().map(|d| d.split(':').next().unwrap()).collect();
        assert_eq!(kinds, BTreeSet::from(["/dev/null", "pipe", "socket"]));
        host.control().succeed("DELETE", "/v1/instances/web", None);
        if by_kmorphctl {
            end_daemon(&host);
        }
    }
}

/// Number of moments of a start at which a signal is sent.
const MOMENTS: u64 = 40;
/// Spread of the moments: longer than a start takes.
const SPREAD: Duration = Duration::from_millis(80);

/// Starts the daemon like kmorphctl, with `signal` blocked until the daemon can handle it, and sends the signal at one
/// of the [`MOMENTS`].
fn started_and_sent(host: &Host, signal: Signal, moment: u64) -> (std::process::Child, Pid) {
    let mut command = host.command();
    let mut blocked = SigSet::empty();
    blocked.add(signal);
    // Before `main`, a signal stays pending.
    let block = move || {
        Ok(pthread_sigmask(
            SigmaskHow::SIG_BLOCK,
            Some(&blocked),
            None,
        )?)
    };
    // SAFETY: the closure makes one system call between fork and exec.
    unsafe { command.pre_exec(block) };
    let daemon = command.spawn().unwrap();
    let pid = Pid::from_raw(i32::try_from(daemon.id()).unwrap());
    std::thread::sleep(SPREAD.mul_f64(moment as f64 / MOMENTS as f64));
    kill(pid, signal).unwrap();
    (daemon, pid)
}

#[test]
fn a_hangup_at_any_moment_of_the_start_is_a_reload_and_no_end() {
    let host = Host::prepare(SOUND);
    for moment in 0..MOMENTS {
        let (mut daemon, pid) = started_and_sent(&host, Signal::SIGHUP, moment);
        host.control().wait("an answer", || {
            let ended = daemon.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "moment {moment}: {ended:?}\n{}",
                host.log()
            );
            host.control().try_request("GET", "/v1/daemon", None)
        });
        host.control().wait("the reload", || {
            let reloads = host.log().matches("reloaded").count();
            (reloads as u64 > moment).then_some(())
        });
        kill(pid, Signal::SIGTERM).unwrap();
        let ended = daemon.wait().unwrap();
        assert!(
            ended.success(),
            "moment {moment}: {ended:?}\n{}",
            host.log()
        );
    }
}

#[test]
fn an_end_at_any_moment_of_the_start_is_a_clean_one_and_disturbs_nothing() {
    let mut host = Host::prepare(SOUND);
    host.start();
    host.spawn_kv("web");
    let agent = host.agent("web");
    end_daemon(&host);
    host.daemon_ended();
    // Twice each, because the progress of a start at a given moment varies.
    for round in 0..4 * MOMENTS {
        let (signal, moment) = match round % 2 {
            0 => (Signal::SIGTERM, round / 2 % MOMENTS),
            _ => (Signal::SIGINT, round / 2 % MOMENTS),
        };
        let (mut daemon, _) = started_and_sent(&host, signal, moment);
        let ended = host
            .control()
            .wait("the end", || daemon.try_wait().unwrap());
        let log = host.log();
        assert!(
            ended.success(),
            "{signal}, moment {moment}: {ended:?}\n{log}"
        );
        assert!(
            !log.contains("panicked"),
            "{signal}, moment {moment}\n{log}"
        );
    }
    host.start();
    assert_eq!(host.running("web").processes["agent"], agent);
}

/// Runs `work` on a thread whose user is `NOBODY`.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The library's setuid would change every thread of this process; the system call
            // changes the calling one, and SO_PEERCRED is that of the thread that connects.
            let ids = [NOBODY; 3];
            // SAFETY: setresgid(2) and setresuid(2) take three integers and touch no memory.
            let set = unsafe {
                libc::syscall(libc::SYS_setresgid, ids[0], ids[1], ids[2])
                    | libc::syscall(libc::SYS_setresuid, ids[0], ids[1], ids[2])
            };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            work()
        });
        thread.join().unwrap()
    })
}

fn connected(host: &Host, text: &str) -> UnixStream {
    let mut stream = UnixStream::connect(host.path("run/kmorphd.sock")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // A refused connection may be closed already.
    let _ = stream.write_all(text.as_bytes());
    stream
}

fn answer(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_user_who_takes_all_connections_he_can_does_not_lock_root_out() {
    /// Far below the daemon's deadlines, and far above the time of an answer.
    const AT_ONCE: Duration = Duration::from_secs(5);
    const TRIED: usize = 100;
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can call as another user");
        return;
    }
    let host = Host::with(SOUND);
    fs::set_permissions(host.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let ways = [
        "GET /v1/events HTTP/1.1\r\nHost: k\r\n\r\n",
        "GET /v1/inst",
        "",
        "POST /v1/instances HTTP/1.1\r\nHost: k\r\nContent-Length: 100\r\n\r\n{",
    ];
    let mut taken: Vec<Vec<_>> = Vec::new();
    for way in ways {
        taken.push(as_nobody(|| {
            (0..TRIED).map(|_| connected(&host, way)).collect()
        }));
        let begun = Instant::now();
        let seen: Vec<InstanceSummary> = host.control().get("/v1/instances");
        assert!(seen.is_empty());
        assert!(begun.elapsed() < AT_ONCE, "{way:?}: {:?}", begun.elapsed());
    }
    // The user gets the reason, and the user's share again after closing the connections.
    let last = taken.iter_mut().rev().flatten().next().unwrap();
    let text = answer(last);
    assert!(
        text.contains(" 503 ") && text.contains("uid 65534"),
        "{text}"
    );
    drop(taken);
    as_nobody(|| {
        host.control().wait("an answer", || {
            let reply = host.control().try_request("GET", "/v1/daemon", None)?;
            (reply.status == 200).then_some(())
        });
    });
}

#[test]
fn a_connection_carries_one_request_and_waits_for_no_second_one() {
    let host = Host::with(SOUND);
    let first = "GET /v1/instances HTTP/1.1\r\nHost: k\r\n\r\n";
    for second in ["", "GET /v1/inst"] {
        let mut stream = connected(&host, &format!("{first}{second}"));
        let text = answer(&mut stream);
        assert!(text.contains(" 200 "), "{text}");
        assert_eq!(text.matches("HTTP/1.1").count(), 1, "{text}");
        assert!(text.to_lowercase().contains("connection: close"), "{text}");
    }
    // An incomplete head has its own deadline.
    let mut half = connected(&host, "GET /v1/inst");
    let text = answer(&mut half);
    assert!(text.is_empty() || text.contains(" 408 "), "{text}");
}

#[test]
fn a_user_has_few_event_streams_and_leaves_some_to_root() {
    /// More than a user's share, fewer than all.
    const TRIED: usize = 20;
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can call as another user");
        return;
    }
    let host = Host::with(SOUND);
    fs::set_permissions(host.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let follow = || {
        let mut stream = connected(&host, "GET /v1/events HTTP/1.1\r\nHost: k\r\n\r\n");
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        (stream, head.ends_with(b" 200"))
    };
    let theirs: Vec<_> = as_nobody(|| (0..TRIED).map(|_| follow()).collect());
    let granted = theirs.iter().filter(|(_, granted)| *granted).count();
    assert_eq!(granted, 8);
    assert!(follow().1);
    drop(theirs);
}

/// Creates a FIFO and a sparse file of a gigabyte, and returns paths that cannot be read as a file.
fn unreadable(host: &Host) -> [(PathBuf, &'static str); 4] {
    let fifo = host.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let huge = host.path("huge");
    fs::File::create(&huge).unwrap().set_len(1 << 30).unwrap();
    let directory = host.path("directory");
    fs::create_dir(&directory).unwrap();
    [
        (fifo, "a FIFO"),
        ("/dev/zero".into(), "a device"),
        (directory, "a directory"),
        (huge, "larger than"),
    ]
}

#[test]
fn a_configuration_that_cannot_be_read_whole_is_refused_at_start_and_reload_and_keeps_nobody_waiting()
 {
    let mut host = Host::prepare(SOUND);
    let named = host.config_path();
    let kept = host.path("kept.conf");
    let replace = |with: &Path| {
        fs::remove_file(&named).unwrap();
        symlink(with, &named).unwrap();
    };
    fs::copy(&named, &kept).unwrap();
    let unreadable = unreadable(&host);
    for (path, words) in &unreadable {
        replace(path);
        let text = host.refused_start(&[]);
        assert!(text.contains(words), "{words}: {text}");
    }
    replace(&kept);
    host.start();
    for (path, words) in &unreadable {
        replace(path);
        let reload = host.control().request("POST", "/v1/daemon/reload", None);
        let error = reload.refusal();
        assert!(error.message.contains(words), "{words}: {error}");
        let seen: Vec<InstanceSummary> = host.control().get("/v1/instances");
        assert!(seen.is_empty());
    }
}

#[test]
fn a_file_that_kmorphctl_is_to_read_is_regular_and_has_a_bound() {
    let host = Host::prepare(SOUND);
    for (path, words) in unreadable(&host) {
        let output = Command::new(program("kmorphctl"))
            .args(["policy", "import"])
            .arg(&path)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(7), "{text}");
        assert!(text.contains(words), "{words}: {text}");
    }
    let fifo = host.path("fifo");
    let output = Command::new(program("kmorphctl"))
        .args(["vmcore", "analyze"])
        .arg(&fifo)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && text.contains("a FIFO"),
        "{text}"
    );
}

#[test]
fn kmorphctl_says_nothing_to_another_users_daemon_in_the_place_of_its_own() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can listen as another user");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let run_dir = dir.path().join("kmorph");
    let listener = as_nobody(|| {
        fs::create_dir(&run_dir).unwrap();
        std::os::unix::net::UnixListener::bind(run_dir.join("kmorphd.sock")).unwrap()
    });
    // A place where that user can execute the program, wherever it was built.
    let kmorphctl = dir.path().join("kmorphctl");
    fs::copy(program("kmorphctl"), &kmorphctl).unwrap();
    let ask = |named: bool| {
        let mut command = Command::new(&kmorphctl);
        command
            .args(["list", "--timeout=1"])
            .env("XDG_RUNTIME_DIR", dir.path())
            .env_remove("KMORPH_SOCKET")
            .env("HOME", dir.path())
            // A user other than root and the listening user.
            .uid(65_533)
            .stdin(Stdio::null());
        if named {
            command.arg("--socket").arg(run_dir.join("kmorphd.sock"));
        }
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    fs::set_permissions(
        run_dir.join("kmorphd.sock"),
        fs::Permissions::from_mode(0o666),
    )
    .unwrap();
    let text = ask(false);
    assert!(text.contains("uid 65534 answers"), "{text}");
    assert!(!ask(true).contains("uid 65534 answers"));
    drop(listener);
}
