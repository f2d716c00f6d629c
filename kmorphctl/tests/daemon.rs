//! Starting and stopping the daemon, with a script in its place.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Ended, FakeDaemon, Reply, command, ctl, daemon};

/// kmorphctl in `dir`, with `script` beside it under the daemon's name.
fn installed(dir: &Path, script: &str) -> PathBuf {
    let program = dir.join("kmorphctl");
    let built = Path::new(env!("CARGO_BIN_EXE_kmorphctl"));
    if std::fs::hard_link(built, &program).is_err() {
        std::fs::copy(built, &program).unwrap();
    }
    let kmorphd = dir.join("kmorphd");
    let version = "[ \"$1\" != --version ] || { echo kmorphd 0.0.0; exit 0; }";
    std::fs::write(&kmorphd, format!("#!/bin/sh\n{version}\n{script}\n")).unwrap();
    std::fs::set_permissions(&kmorphd, std::fs::Permissions::from_mode(0o755)).unwrap();
    program
}

fn start(dir: &Path, socket: &Path, script: &str, wait: &str) -> Ended {
    let log = dir.join("log");
    let output = command(&installed(dir, script), socket)
        .env("DIR", dir)
        .args(["daemon", "start", "--wait-timeout", wait, "--log-file"])
        .arg(log)
        .output()
        .unwrap();
    Ended::of(&output)
}

fn written_pid(dir: &Path) -> u32 {
    let text = std::fs::read_to_string(dir.join("pid")).unwrap();
    text.trim().parse().unwrap()
}

#[test]
fn a_daemon_that_ends_at_once_is_quoted() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("log"), "an older line\n").unwrap();
    let script = "echo \"kmorphd: line 3, column 1: unknown key\" >&2; exit 1";
    let ended = start(dir.path(), &dir.path().join("s"), script, "30");
    assert_eq!(ended.code, 3, "{ended:?}");
    assert!(
        ended.stderr.contains("line 3, column 1: unknown key"),
        "{ended:?}"
    );
    assert!(!ended.stderr.contains("an older line"), "{ended:?}");
}

/// The C project of the same name has a kmorphd too. It knows no options but its own, and without any it runs in the
/// background.
#[test]
fn another_program_of_the_daemons_name_is_not_started() {
    let dir = tempfile::tempdir().unwrap();
    let program = installed(dir.path(), "");
    let script = "#!/bin/sh\n[ $# = 0 ] || { echo 'usage: kmorphd [--config PATH]' >&2; exit 2; }\n\
                  touch \"$DIR/started\"\n";
    std::fs::write(dir.path().join("kmorphd"), script).unwrap();
    for words in [
        ["daemon", "start"].as_slice(),
        &["daemon", "start", "--foreground"],
    ] {
        let output = command(&program, &dir.path().join("s"))
            .env("DIR", dir.path())
            .args(words)
            .env_remove("KMORPH_SOCKET")
            .env("XDG_STATE_HOME", dir.path())
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("XDG_CONFIG_HOME", dir.path())
            .output()
            .unwrap();
        let ended = Ended::of(&output);
        assert_eq!(ended.code, 3, "{ended:?}");
        assert!(ended.stderr.contains("is not kmorph's daemon"), "{ended:?}");
        assert!(!dir.path().join("started").exists(), "{ended:?}");
    }
}

#[test]
fn a_daemon_that_never_answers_is_ended_again() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo $$ >$DIR/pid; exec sleep 1000";
    let ended = start(dir.path(), &dir.path().join("s"), script, "0.5");
    assert_eq!(ended.code, 3, "{ended:?}");
    assert!(
        ended
            .stderr
            .contains("did not answer within 0.5s and was stopped"),
        "{ended:?}"
    );
    let proc = format!("/proc/{}", written_pid(dir.path()));
    assert!(!Path::new(&proc).exists(), "it lives on");
}

#[test]
fn a_daemon_that_answers_runs_in_a_session_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let fake = FakeDaemon::start(move |_| {
        let text = std::fs::read_to_string(&pid_file).unwrap_or_default();
        match text.trim().parse() {
            Ok(pid) => Reply::ok(daemon(pid)),
            Err(_) => Reply::refusal(503, "busy", "not yet"),
        }
    });
    let script = "echo \"$@\" >$DIR/words; echo $$ >$DIR/pid; exec sleep 1000";
    let ended = start(dir.path(), &fake.socket(), script, "30");
    assert_eq!(ended.code, 0, "{ended:?}");
    let pid = written_pid(dir.path());
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // After the name: state, parent, process group, session.
    let session = stat.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap();
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    assert_eq!(session, pid.to_string());
    let words = std::fs::read_to_string(dir.path().join("words")).unwrap();
    assert_eq!(
        words.trim(),
        format!("--socket {}", fake.socket().display())
    );
}

#[test]
fn a_second_daemon_is_not_started() {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeDaemon::start(|_| Reply::ok(daemon(77)));
    let ended = start(dir.path(), &fake.socket(), "touch $DIR/started", "30");
    assert_eq!(ended.code, 5, "{ended:?}");
    assert!(ended.stderr.contains("pid 77"), "{ended:?}");
    assert!(!dir.path().join("started").exists());
}

/// A process to be taken for the daemon; it ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn process() -> Process {
    Process(
        std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap(),
    )
}

/// A request whose last bytes are `end`.
fn read_until(stream: &mut std::os::unix::net::UnixStream, end: &str) -> String {
    use std::io::Read;
    let mut request = Vec::new();
    while !request.ends_with(end.as_bytes()) {
        let mut piece = [0; 4096];
        let length = stream.read(&mut piece).unwrap();
        assert_ne!(length, 0, "the request ends early");
        request.extend_from_slice(&piece[..length]);
    }
    String::from_utf8(request).unwrap()
}

/// Answers as the daemon with this pid, and hangs up.
fn answer(stream: &mut std::os::unix::net::UnixStream, pid: u32) {
    use std::io::Write;
    let body = daemon(pid).to_string();
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all((head + &body).as_bytes()).unwrap();
}

#[test]
fn stop_waits_until_the_process_is_gone() {
    let process = process();
    let pid = process.0.id();
    let dir = tempfile::tempdir().unwrap();
    // A socket that is gone with the process: the listener is dropped before the answer.
    let socket = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        // Who it is, first.
        let (mut stream, _) = listener.accept().unwrap();
        let asked = read_until(&mut stream, "\r\n\r\n");
        assert!(asked.starts_with("GET /v1/daemon"), "{asked}");
        answer(&mut stream, pid);
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        drop(listener);
        let request = read_until(&mut stream, "}");
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
        answer(&mut stream, pid);
        request
    });
    let ended = ctl(&socket, &["daemon", "stop", "--graceful"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    let wanted = format!("kmorphd has stopped (pid {pid}); 1 instance keeps running\n");
    assert_eq!(ended.stdout, wanted);
    let request = server.join().unwrap();
    assert!(request.starts_with("POST /v1/daemon/stop"), "{request}");
    assert!(request.ends_with("{\"graceful\":true}"), "{request}");
}

#[test]
fn a_daemon_that_does_not_end_in_time_is_reported_not_killed() {
    let mut process = process();
    let pid = process.0.id();
    let fake = FakeDaemon::start(move |_| Reply::ok(daemon(pid)));
    let ended = fake.ctl("daemon stop --wait-timeout 0.3");
    assert_eq!(ended.code, 10, "{ended:?}");
    assert!(process.0.try_wait().unwrap().is_none(), "it was killed");
}

#[test]
fn a_reload_says_what_is_in_force_and_what_is_not() {
    let fake = FakeDaemon::start(|_| {
        Reply::ok(serde_json::json!({ "applied": ["pool"], "needs_restart": ["backend"] }))
    });
    let ended = fake.ctl("daemon reload");
    assert_eq!(ended.code, 0);
    let wanted = "Now in force: pool\nNeeds a restart of kmorphd: backend\n";
    assert_eq!(ended.stdout, wanted);
}
