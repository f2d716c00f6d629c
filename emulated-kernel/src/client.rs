//! The client for tests: starts the emulated kernel as a separate process and talks to it.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::Uid;

use crate::control;
use crate::machine::Generation;

/// The FUSE device.
const FUSE: &str = "/dev/fuse";

/// An emulated kernel in a process of its own. The process ends on drop, and also when this process ends.
#[derive(Debug)]
pub struct Process {
    directory: PathBuf,
    child: Child,
}

impl Process {
    /// Returns true if this machine can emulate a kernel; otherwise prints that the test is skipped.
    pub fn is_possible() -> bool {
        let obstacle = Self::obstacle();
        if let Some(obstacle) = &obstacle {
            eprintln!("SKIPPED: a kernel cannot be emulated here: {obstacle}");
        }
        obstacle.is_none()
    }

    /// Returns the reason why this machine cannot emulate a kernel. The check includes a trial mount, because a
    /// container may have root and `/dev/fuse`, but no right to mount.
    pub fn obstacle() -> Option<String> {
        if !Uid::effective().is_root() {
            return Some("its files are mounted, which takes root".to_owned());
        }
        let device = OpenOptions::new().read(true).write(true).open(FUSE);
        let device = match device {
            Ok(device) => device,
            Err(error) => {
                return Some(format!(
                    "{FUSE}, which serves its files, cannot be opened: {error}"
                ));
            }
        };
        let place = match tempfile::tempdir() {
            Ok(place) => place,
            Err(error) => return Some(format!("a temporary directory cannot be made: {error}")),
        };
        let raw = device.as_raw_fd();
        let options = format!("fd={raw},rootmode=40000,user_id=0,group_id=0");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let fuse = Some("fuse");
        match mount(fuse, place.path(), fuse, flags, Some(options.as_str())) {
            Ok(()) => {
                // Closed first: no server would answer the requests of an unmount.
                drop(device);
                let _ = umount2(place.path(), MntFlags::MNT_DETACH);
                None
            }
            Err(error) => Some(format!("its files cannot be mounted: {error}")),
        }
    }

    /// Starts the program in `directory`, which exists and is empty. The instances run this agent.
    pub fn start(program: &Path, directory: &Path, agent: &Path, generation: Generation) -> Self {
        let mut command = Command::new(program);
        command.arg(directory).arg(agent);
        if generation == Generation::Silent {
            command.arg("silent");
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        let said = child.stdout.take().unwrap();
        BufReader::new(said).read_line(&mut ready).unwrap();
        assert!(!ready.is_empty(), "the emulated kernel does not start");
        Self {
            directory: directory.to_owned(),
            child,
        }
    }

    /// Returns the process ID.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Returns the directory of the kernel's files.
    pub fn root(&self) -> PathBuf {
        self.directory.join("multikernel")
    }

    /// Returns the path of a file next to that directory: `run/kerf.lock`, `vsock`.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns the command that runs `program` with its loads, boots and halts answered by the emulated kernel. `own`
    /// is the program of this crate.
    pub fn under(&self, own: &Path, program: &Path) -> Command {
        let mut command = Command::new(own);
        command.arg("under").arg(&self.directory).arg(program);
        command
    }

    /// Executes a line of the control socket.
    ///
    /// # Errors
    /// The error number of a refusal.
    pub fn ask(&self, line: &str) -> Result<String, i32> {
        ask(&self.directory, line)
    }

    /// Injects an event into an instance; returns the answer.
    pub fn strike(&self, what: &str, name: &str) -> String {
        let line = format!("{what} {name}");
        self.ask(&line)
            .unwrap_or_else(|errno| panic!("{line}: error {errno}"))
    }

    /// Makes future boots wait, or lets them continue.
    pub fn hold_boots(&self, held: bool) {
        let line = format!("boots {}", if held { "wait" } else { "go" });
        self.ask(&line)
            .unwrap_or_else(|errno| panic!("{line}: error {errno}"));
    }

    /// Delays changes of an instance's status by `lag`.
    pub fn lag(&self, name: &str, lag: Duration) {
        let line = format!("lag {name} {}", lag.as_millis());
        self.ask(&line)
            .unwrap_or_else(|errno| panic!("{line}: error {errno}"));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Makes the emulated kernel in this directory execute a line.
///
/// # Errors
/// The error number of a refusal.
pub fn ask(directory: &Path, line: &str) -> Result<String, i32> {
    let mut stream = UnixStream::connect(directory.join(control::SOCKET)).unwrap();
    writeln!(stream, "{line}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    let answer = answer.trim_end();
    match answer.split_once(' ').unwrap_or((answer, "")) {
        ("ok", rest) => Ok(rest.to_owned()),
        ("error", errno) => Err(errno.parse().unwrap()),
        _ => panic!("the emulated kernel hung up on {line:?}"),
    }
}
