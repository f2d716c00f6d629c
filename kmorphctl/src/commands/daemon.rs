//! `kmorphctl daemon`: starts and stops kmorphd, and shows its status.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kmorph_control_api::address::path;
use kmorph_control_api::paths::STATE_MARKS;
use kmorph_control_api::{DaemonStatus, ReloadReport, StopRequest};
use kmorph_files::{OwnDir, PRIVATE_DIR, Refusal};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

use super::detach;
use crate::cli::{DaemonCommand, StartArgs, StopArgs};
use crate::client::{Answer, Client};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::{age_s, bytes, cpu_list, local_time};
use crate::output::{Output, Tone, Word};
use crate::places::Places;

/// The daemon's program.
const PROGRAM: &str = "kmorphd";
/// Interval between checks of a starting or stopping daemon.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum time for a daemon that did not come up to end, before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time for the daemon's program to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of the shown part of a failed daemon's log, bytes.
const LOG_SHOWN_BYTES: u64 = 4096;
/// Maximum number of its lines that are shown.
const LOG_SHOWN_LINES: usize = 8;

pub(super) async fn run(
    client: &Client,
    out: &mut Output,
    places: &Places,
    command: DaemonCommand,
) -> Result<Exit, Failure> {
    match command {
        DaemonCommand::Start(args) if args.foreground => Err(become_daemon(&args, places).await),
        DaemonCommand::Start(args) => start(client, out, &args, places).await,
        DaemonCommand::Stop(args) => stop(client, out, &args).await,
        DaemonCommand::Status => status(client, out).await,
        DaemonCommand::Reload => reload(client, out).await,
    }
}

/// Returns the command that runs the daemon: next to this program, otherwise from PATH.
async fn program(args: &StartArgs, places: &Places) -> Result<(PathBuf, Command), Failure> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| own.parent().map(|dir| dir.join(PROGRAM)))
        .filter(|program| program.is_file());
    let program = beside.unwrap_or_else(|| PathBuf::from(PROGRAM));
    check_program(&program).await?;
    let mut command = Command::new(&program);
    if let Some(config) = &args.config {
        command.arg("--config").arg(config);
    }
    if places.socket_was_named {
        command.arg("--socket").arg(&places.socket);
    }
    Ok((program, command))
}

/// Refuses another program with the daemon's name: the C project of the same name has a `kmorphd` too, which takes over
/// the machine. That one does not know `--version`, and exits.
async fn check_program(program: &Path) -> Result<(), Failure> {
    let mut asked = tokio::process::Command::new(program);
    asked
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let refused = |why: &str| {
        let text = format!("{} is not kmorph's daemon: {why}", program.display());
        Failure::new(Exit::Unreachable, text)
            .hint("install kmorphd beside kmorphctl; docs/operations.md explains how to run both kmorph and the C project of that name")
    };
    let answer = match tokio::time::timeout(VERSION_TIMEOUT, asked.output()).await {
        Ok(answer) => answer.map_err(|error| cannot_run(program, &error))?,
        Err(_) => return Err(refused("it did not exit when run with --version")),
    };
    let name = format!("{PROGRAM} ");
    match answer.status.success() && answer.stdout.starts_with(name.as_bytes()) {
        true => Ok(()),
        false => Err(refused("its --version output is not that of kmorphd")),
    }
}

fn cannot_run(program: &Path, error: &std::io::Error) -> Failure {
    let text = format!("cannot run {}: {error}", program.display());
    match error.kind() {
        std::io::ErrorKind::NotFound => Failure::new(Exit::NotFound, text)
            .hint("install kmorphd beside kmorphctl or in a directory of PATH"),
        _ => Failure::new(Exit::Unreachable, text),
    }
}

/// Returns only on failure.
async fn become_daemon(args: &StartArgs, places: &Places) -> Failure {
    match program(args, places).await {
        Ok((program, mut command)) => cannot_run(&program, &command.exec()),
        Err(failure) => failure,
    }
}

async fn start(
    client: &Client,
    out: &mut Output,
    args: &StartArgs,
    places: &Places,
) -> Result<Exit, Failure> {
    if let Ok(running) = client.get::<DaemonStatus>(&path(&["daemon"])).await {
        let text = format!(
            "a daemon is already running: pid {} answers at {}",
            running.value.pid,
            client.socket().display()
        );
        return Err(Failure::new(Exit::Refused, text)
            .hint("`kmorphctl daemon status` shows it, `kmorphctl daemon stop` ends it"));
    }
    let log_path = args.log_file.as_ref().unwrap_or(&places.log);
    let log = open_log(log_path, places)?;
    let began_at = log.metadata().map_or(0, |meta| meta.len());
    let (program, command) = program(args, places).await?;
    let child = detach::start(command, &log).map_err(|error| cannot_run(&program, &error))?;
    let limit = Duration::from_secs_f64(args.wait_timeout);
    let answer = match wait_until_up(client, child, limit).await {
        Ok(answer) => answer,
        Err(why) => return Err(did_not_start(&why, log_path, began_at)),
    };
    if out.is_json() {
        out.json(&answer.raw)?;
    } else {
        let daemon = &answer.value;
        let text = format!("kmorphd {} is running: pid {}", daemon.version, daemon.pid);
        out.line(&text)?;
        out.line(&format!("Socket: {}", client.socket().display()))?;
        out.line(&format!("Log: {}", log_path.display()))?;
    }
    Ok(Exit::Ok)
}

/// Opens the log for appending. The log is accessible only to its owner, and so is its directory if it is the
/// daemon's state directory or must be created.
fn open_log(path: &Path, places: &Places) -> Result<File, Failure> {
    let in_state_dir = path == places.log;
    let refused = |refusal: Refusal| {
        match in_state_dir {
        // The daemon keeps its journal there, and refuses the directory too.
        true => Failure::new(
            Exit::InvalidInput,
            format!("cannot use the state directory: {refusal}"),
        )
        .hint("`paths.state_dir` in the daemon's configuration selects another directory, `--log-file` another log file"),
        false => Failure::new(
            Exit::InvalidInput,
            format!("cannot write the log: {refusal}"),
        )
        .hint("choose another place with `--log-file`"),
    }
    };
    let named = std::path::absolute(path)
        .map_err(|error| Failure::file("find the directory of the log", path, &error))?;
    let (Some(dir), Some(name)) = (named.parent(), named.file_name()) else {
        let text = format!("the log {} names no file", path.display());
        return Err(Failure::new(Exit::Usage, text));
    };
    let dir = if in_state_dir {
        OwnDir::make_private(dir, &STATE_MARKS)
    } else if dir.exists() {
        OwnDir::shared(dir)
    } else {
        OwnDir::make(dir, PRIVATE_DIR)
    };
    dir.and_then(|dir| dir.append(name)).map_err(refused)
}

/// Waits until the daemon that was just started answers; ends it if it does not.
async fn wait_until_up(
    client: &Client,
    mut child: Child,
    limit: Duration,
) -> Result<Answer<DaemonStatus>, String> {
    let deadline = Instant::now() + limit;
    loop {
        let asked = tokio::time::timeout_at(deadline, client.get::<DaemonStatus>("/v1/daemon"));
        match asked.await {
            Ok(Ok(answer)) if answer.value.pid == child.id() => return Ok(answer),
            Ok(_) | Err(_) => {}
        }
        match child.try_wait() {
            Ok(Some(status)) => return Err(format!("it exited immediately ({status})")),
            Ok(None) => {}
            Err(error) => return Err(format!("cannot watch the process: {error}")),
        }
        let stopped = tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => None,
            _ = tokio::signal::ctrl_c() => Some("interrupted by Ctrl-C".to_owned()),
        };
        let late = || format!("it did not answer within {}s", limit.as_secs_f64());
        let over = (Instant::now() >= deadline).then(late);
        if let Some(why) = stopped.or(over) {
            end(&mut child).await;
            return Err(format!("{why} and was stopped"));
        }
    }
}

/// Ends a daemon that did not come up: requests a shutdown first.
async fn end(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let deadline = Instant::now() + END_TIMEOUT;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Returns a backend by name, with its findings on the machine, which usually begin with the name.
fn backend(name: &str, detail: &str) -> String {
    match detail.starts_with(name) {
        true => detail.to_owned(),
        false => format!("{name} ({detail})"),
    }
}

fn did_not_start(why: &str, log: &Path, began_at: u64) -> Failure {
    let mut text = format!("kmorphd did not start: {why}");
    for line in last_lines(log, began_at) {
        text.push_str("\n  ");
        text.push_str(&line);
    }
    Failure::new(Exit::Unreachable, text).hint(format!("see its log, {}", log.display()))
}

/// Returns the last lines written to the log since it had `began_at` bytes.
fn last_lines(log: &Path, began_at: u64) -> Vec<String> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        let from = began_at.max(length.saturating_sub(LOG_SHOWN_BYTES));
        file.seek(SeekFrom::Start(from))?;
        let mut tail = Vec::new();
        file.take(LOG_SHOWN_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    let tail = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&tail);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let first = lines.len().saturating_sub(LOG_SHOWN_LINES);
    lines[first..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect()
}

async fn stop(client: &Client, out: &mut Output, args: &StopArgs) -> Result<Exit, Failure> {
    let graceful = args.graceful;
    // Identify the daemon before it can have ended: afterwards another process may have its pid.
    let before = client.get::<DaemonStatus>(&path(&["daemon"])).await?;
    let before = (before.value.pid, started_at(before.value.pid));
    let asked = client
        .post::<DaemonStatus>(&path(&["daemon", "stop"]), &StopRequest { graceful })
        .await?;
    let pid = asked.value.pid;
    let started = before.1.filter(|_| before.0 == pid);
    let limit = Duration::from_secs_f64(args.wait_timeout);
    let ended = tokio::select! {
        ended = tokio::time::timeout(limit, wait_until_gone(client.socket(), pid, started)) => ended.is_ok(),
        _ = tokio::signal::ctrl_c() => {
            let text = format!("stopped waiting; kmorphd (pid {pid}) is stopping");
            return Err(Failure::new(Exit::Interrupted, text));
        }
    };
    if !ended {
        let text = format!(
            "kmorphd (pid {pid}) is stopping, but has not exited within {}s",
            args.wait_timeout
        );
        return Err(Failure::new(Exit::TimedOut, text).hint(
            "`kmorphctl operation list` shows what it is still doing; to wait longer, use --wait-timeout",
        ));
    }
    if out.is_json() {
        out.json(&asked.raw)?;
    } else {
        let left = match asked.value.instances {
            0 => String::new(),
            1 => "; 1 instance keeps running".to_owned(),
            many => format!("; {many} instances keep running"),
        };
        out.line(&format!("kmorphd has stopped (pid {pid}){left}"))?;
    }
    Ok(Exit::Ok)
}

/// Waits until the process with that start time is gone or, if the process is not visible from here, until its socket
/// is gone.
async fn wait_until_gone(socket: &Path, pid: u32, started: Option<u64>) {
    let lives = || started.is_some() && started_at(pid) == started;
    while lives() || std::os::unix::net::UnixStream::connect(socket).is_ok() {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Returns the start time of the process with this pid, in clock ticks since boot; `None` if there is no such
/// process, or it is a zombie.
fn started_at(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    started_in(&stat)
}

/// Parses fields 3 and 22 of proc_pid_stat(5); the name before them may contain any characters.
fn started_in(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

async fn reload(client: &Client, out: &mut Output) -> Result<Exit, Failure> {
    let answer = client
        .post::<ReloadReport>(&path(&["daemon", "reload"]), &serde_json::json!({}))
        .await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let ReloadReport {
        applied,
        needs_restart,
    } = answer.value;
    if applied.is_empty() && needs_restart.is_empty() {
        out.line("Configuration reloaded; nothing changed")?;
    }
    if !applied.is_empty() {
        out.line(&format!("Now in force: {}", applied.join(", ")))?;
    }
    if !needs_restart.is_empty() {
        let keys = needs_restart.join(", ");
        out.line(&format!("Needs a restart of kmorphd: {keys}"))?;
    }
    Ok(Exit::Ok)
}

async fn status(client: &Client, out: &mut Output) -> Result<Exit, Failure> {
    let answer = client.get::<DaemonStatus>(&path(&["daemon"])).await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let daemon = answer.value;
    let state = match (daemon.stopping, daemon.journal_ok) {
        (true, _) => Word::toned("STOPPING", Tone::Warning),
        (false, true) => Word::toned("RUNNING", Tone::Good),
        (false, false) => Word::toned("RUNNING, journal not writable", Tone::Bad),
    };
    let since = format!(
        "{} ({})",
        local_time(&daemon.started_at),
        age_s(daemon.uptime_s)
    );
    let pool = &daemon.pool;
    let besides = |held: String| match pool.memory_besides_bytes {
        0 => String::new(),
        _ => format!("; held by others: {held}"),
    };
    let cpus = match pool.cpus_shared {
        true => format!("{} (shared)", cpu_list(&pool.cpus)),
        false => format!(
            "{} (free: {}{})",
            cpu_list(&pool.cpus),
            cpu_list(&pool.cpus_free),
            besides(cpu_list(&pool.cpus_besides))
        ),
    };
    let memory = format!(
        "{} ({} free{})",
        bytes(pool.memory_bytes),
        bytes(pool.memory_free_bytes),
        besides(bytes(pool.memory_besides_bytes))
    );
    let config = daemon.config_path.unwrap_or_else(|| "none".to_owned());
    let mut fields: Vec<(&str, Word)> = vec![
        (
            "Daemon",
            format!("kmorphd {}, pid {}", daemon.version, daemon.pid).into(),
        ),
        ("Status", state),
        ("Started", since.into()),
        (
            "Backend",
            backend(&daemon.backend, &daemon.backend_detail).into(),
        ),
        ("Socket", client.socket().display().to_string().into()),
        ("Configuration", config.into()),
        ("State directory", daemon.state_dir.into()),
        ("Runtime directory", daemon.run_dir.into()),
        ("Instances", daemon.instances.to_string().into()),
        (
            "Operations under way",
            daemon.operations_running.to_string().into(),
        ),
        ("Pool CPUs", cpus.into()),
        ("Pool memory", memory.into()),
        (
            "Last self-test",
            match &daemon.last_doctor {
                Some(report) => super::doctor::outcome(report),
                None if daemon.can_self_test => "never: `kmorphctl doctor`".into(),
                None => "-: this backend cannot capture memory".into(),
            },
        ),
        ("Actors replaced", daemon.actor_restarts.to_string().into()),
        (
            "Lateness, last minute",
            format!("{}ms", daemon.self_lag_ms).into(),
        ),
    ];
    for kept in &daemon.kept {
        let text = format!("{}, {}", kept.instance, super::kept(kept));
        fields.push(("Not given back", Word::toned(text, Tone::Bad)));
    }
    if let Some(error) = daemon.journal_error {
        fields.push(("Journal", Word::toned(error, Tone::Bad)));
    }
    out.fields(&fields)?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_told_from_another_process_by_its_start() {
        let stat = |state: &str| {
            format!("7 (a) R 1) {state} 1 7 42 0 -1 0 0 0 0 0 0 0 0 0 20 0 3 0 12345 0 0")
        };
        assert_eq!(started_in(&stat("S")), Some(12345));
        assert_eq!(started_in(&stat("Z")), None);
        assert!(started_at(std::process::id()).is_some());
    }
}
