//! The processes on an instance's CPUs: the agent and its children. A running process stands for a running CPU.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::vsock::Line;

/// Environment variable that marks the processes of one boot.
const MARK: &str = "KMORPH_EMULATED_SPAWN";
/// Interval between checks whether the processes have ended.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Directory in which a kernel shows the pressure of its programs.
const PRESSURE: &CStr = c"/proc/pressure";
/// First message of a kernel, before its release.
const BANNER: &[u8] = b"Linux version ";

/// The data that an instance uses of a kernel image, an initramfs and a command line.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) release: String,
    pub(crate) config: Option<Vec<u8>>,
    pub(crate) cmdline: String,
}

impl Loaded {
    /// Returns `None` if the image has a format that the kernel does not load.
    pub(crate) fn new(image: &[u8], initrd: &[u8], cmdline: String) -> Option<Self> {
        if !image.starts_with(b"\x7fELF") {
            return None;
        }
        let at = image.windows(BANNER.len()).position(|part| part == BANNER);
        let words = at.map(|at| &image[at + BANNER.len()..]);
        let word = words.and_then(|rest| rest.split(|b| !b.is_ascii_graphic()).next());
        Some(Self {
            release: String::from_utf8_lossy(word.unwrap_or_default()).into_owned(),
            config: crate::initrd::agent_config(initrd),
            cmdline,
        })
    }

    /// Returns true if a panic restarts the kernel, which informs the host; otherwise a panic halts the CPUs silently.
    pub(crate) fn restarts_on_panic(&self) -> bool {
        let mut words = self.cmdline.split_whitespace();
        words.rfind(|word| word.starts_with("panic=")) == Some("panic=-1")
    }
}

/// One boot of an instance.
pub(crate) struct Spawn {
    pub(crate) loaded: Loaded,
    pub(crate) line: Arc<Line>,
    /// True if the instance has told the host that it has halted.
    pub(crate) has_said_so: AtomicBool,
    mark: String,
    agent: i32,
}

impl Spawn {
    /// Starts the agent in `directory`, which is created; `vsock` is the socket of its ports.
    pub(crate) fn start(
        loaded: Loaded,
        agent: &Path,
        directory: &Path,
        vsock: &Path,
    ) -> io::Result<(Self, Child)> {
        std::fs::create_dir_all(directory)?;
        let text = loaded.config.as_deref().unwrap_or_default();
        let mut config: Value = serde_json::from_slice(text)?;
        let own = directory.join("agent.sock");
        let mut ports = Vec::new();
        for port in config["ports"].as_array().into_iter().flatten() {
            let number = port["port"].as_u64().ok_or(io::ErrorKind::InvalidData)?;
            let path = directory.join(format!("{number}.sock"));
            ports.push((
                number,
                path.clone(),
                OwnedFd::from(UnixListener::bind(path)?),
            ));
        }
        // Replacements for the kernel and the vsock of an agent in a guest.
        config["role"] = json!("child");
        config["listen"] = json!({ "kind": "unix", "path": own, "port": 9000 });
        config["kernel_release"] = json!(loaded.release);
        config["modules"] = json!([]);
        if let Some(fields) = config.as_object_mut() {
            fields.remove("vsock_option");
        }
        let path = directory.join("agent.json");
        std::fs::write(&path, serde_json::to_vec(&config)?)?;
        let listeners: Vec<&OwnedFd> = ports.iter().map(|(_, _, fd)| fd).collect();
        let child = start_agent(agent, &path, directory, &listeners)?;
        let ways = ports.iter().map(|(port, path, _)| (*port, path.clone()));
        let ways = ways.chain([(9000, own)]).collect();
        Ok((
            Self {
                line: Line::open(vsock, ways)?,
                loaded,
                has_said_so: AtomicBool::new(false),
                mark: mark_of(directory),
                agent: i32::try_from(child.id()).unwrap(),
            },
            child,
        ))
    }

    /// Asks the agent to exit.
    pub(crate) fn ask(&self) {
        let _ = kill(Pid::from_raw(self.agent), Signal::SIGTERM);
    }

    /// Stops all messages and answers, as if the kernel had ended or hung.
    pub(crate) fn hang(&self) {
        self.line.cut();
        send(&self.mark, Signal::SIGSTOP);
    }

    /// Stops the instance's CPUs, and waits until all have stopped.
    pub(crate) fn stop(&self) {
        self.line.cut();
        stop(&self.mark);
    }

    /// Like [`Spawn::stop`], but asynchronous.
    pub(crate) fn stop_later(&self) {
        self.line.cut();
        let mark = self.mark.clone();
        std::thread::spawn(move || stop(&mark));
    }

    /// Returns the number of running CPUs.
    pub(crate) fn running(&self) -> usize {
        members(&self.mark).len()
    }
}

fn start_agent(
    agent: &Path,
    config: &Path,
    directory: &Path,
    listeners: &[&OwnedFd],
) -> io::Result<Child> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(directory.join("agent.log"))?;
    let numbers: Vec<i32> = listeners.iter().map(|fd| fd.as_raw_fd()).collect();
    let names: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    let (key, value) = mark_of(directory).split_once('=').map(own).unwrap();
    let mut command = Command::new(agent);
    command
        .arg("--config")
        .arg(config)
        .env(key, value)
        .env("KMORPH_LISTENERS", names.join(":"))
        .stdin(Stdio::null())
        .stdout(File::try_clone(&log)?)
        .stderr(log)
        .current_dir("/");
    // SAFETY: between fork and exec, the child only makes the system calls fcntl, unshare and mount, without
    // allocating, on descriptors that are open in both processes.
    unsafe {
        command.pre_exec(move || {
            hide_pressure()?;
            for number in &numbers {
                let fd = std::os::fd::BorrowedFd::borrow_raw(*number);
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        });
    }
    command.spawn()
}

/// Hides the host's pressure figures from this process: an emulated instance has no figures of its own, and the host's
/// figures would make it overloaded whenever the machine is.
fn hide_pressure() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&CStr>;
    // An unmount outside propagates into this namespace.
    mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    let empty = Some(c"tmpfs");
    match mount(empty, PRESSURE, empty, MsFlags::MS_RDONLY, none) {
        // ENOENT: a kernel without pressure accounting.
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn own((key, value): (&str, &str)) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

fn mark_of(directory: &Path) -> String {
    format!("{MARK}={}", directory.display())
}

fn stop(mark: &str) {
    while send(mark, Signal::SIGKILL) > 0 {
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Sends a signal to the marked processes, and returns their number.
fn send(mark: &str, signal: Signal) -> usize {
    let members = members(mark);
    for pid in &members {
        let _ = kill(Pid::from_raw(*pid), signal);
    }
    members.len()
}

/// Returns the processes with the mark, except zombies.
fn members(mark: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let carries = |pid: &i32| {
        let path = PathBuf::from(format!("/proc/{pid}"));
        let environ = std::fs::read(path.join("environ")).unwrap_or_default();
        let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
        environ
            .split(|b| *b == 0)
            .any(|entry| entry == mark.as_bytes())
            && !matches!(state, Some(b'Z' | b'X') | None)
    };
    pids.filter(carries).collect()
}
