//! Guests and the memory between them.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use kmorph_kerf_ring::{Geometry, Mapped, Memory, Region};
use kmp_transport::kerf::{DoorbellServer, HOST, Listening, SharedMemory};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::runtime::Runtime;

use crate::image::{built_modules, cache, image, release};
use crate::reports::reports;
use crate::sleep::Sleeps;

/// The kernels, by their series: 6.1 and 6.12, or the one that `KMORPH_NEWEST_SERIES` names.
pub(crate) const SERIES: Series = Series;

/// See [`SERIES`].
pub(crate) struct Series;

impl Series {
    fn all() -> &'static [&'static str] {
        static ALL: OnceLock<Vec<&'static str>> = OnceLock::new();
        ALL.get_or_init(|| match std::env::var("KMORPH_NEWEST_SERIES") {
            Ok(newest) if !newest.is_empty() => vec![newest.leak()],
            _ => vec!["6.1", "6.12"],
        })
    }

    /// One after the other, and from the first again.
    pub(crate) fn nth(self, number: usize) -> &'static str {
        let all = Self::all();
        all[number % all.len()]
    }

    /// Pairs of kernels that talk to each other: 6.1 and 6.12, or 6.12 and the one that is named.
    pub(crate) fn pairs() -> [(&'static str, &'static str); 2] {
        let (first, other) = match Self::all() {
            [newest] => ("6.12", *newest),
            _ => ("6.1", "6.12"),
        };
        [(first, other), (other, first)]
    }
}

impl IntoIterator for Series {
    type Item = &'static str;
    type IntoIter = std::iter::Copied<std::slice::Iter<'static, &'static str>>;

    fn into_iter(self) -> Self::IntoIter {
        Self::all().iter().copied()
    }
}
/// Longest silence of a guest: software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// What the kernel checks while a test runs: Debian packages none with KASAN or lockdep. Freed and
/// overrun memory is found by the slab allocator, or by KFENCE where there is one; a warning is a panic, and so is a CPU that
/// is stuck for twice 60 s: on a busy host an emulated CPU gets no time for twice the default 10 s.
const CHECKS: &str = "slub_debug=FZP kfence.sample_interval=10 panic_on_warn=1 softlockup_panic=1 watchdog_thresh=60";
/// What a kernel of `scripts/test-kmod-debug` checks; what it finds is in its log, see [`reports`].
const DEBUG_CHECKS: &str = "slub_debug=FZP softlockup_panic=1 watchdog_thresh=60 kasan_multi_shot";
/// Keeps the guest's kernel on its TSC. On a busy host its watchdog compares clocks that QEMU reads at different times
/// and turns to the ACPI timer, whose ports are gone after a suspend: SeaBIOS does not set PMBASE again when it
/// resumes, and every read is 0xffffffff (QEMU 10.0, `info mtree`, q35 and pc). Time would stand still.
///
/// Nor does it check at boot that timer interrupts come, within ten ticks of a TSC that goes on while the host's CPUs
/// are busy with others: Linux panics when they do not ("IO-APIC + timer doesn't work").
const CLOCK: &str = "tsc=reliable no_timer_check";
/// Slots and bytes of each ring.
const SLOTS: u32 = 64;
const BYTES: u32 = 128 * 1024;

/// The host's side: memory, doorbells, and a directory for sockets and images.
pub(crate) struct Machine {
    server: DoorbellServer,
    runtime: Runtime,
    directory: tempfile::TempDir,
    listening: Mutex<Vec<Listening>>,
    boots: AtomicU32,
    modules: PathBuf,
    checks: &'static str,
    cpus: u32,
    program: Option<PathBuf>,
}

impl Machine {
    pub(crate) fn new(peers: u32) -> Self {
        Self::with(peers, built_modules(), CHECKS)
    }

    /// For figures: the module below `modules`, which has a directory for each kernel, and no checks that take time.
    pub(crate) fn unchecked(peers: u32, modules: PathBuf) -> Self {
        Self::with(peers, modules, "")
    }

    fn with(peers: u32, modules: PathBuf, checks: &'static str) -> Self {
        let runtime = Runtime::new().unwrap();
        let geometry = Geometry::new(peers, SLOTS, BYTES).unwrap();
        let server = DoorbellServer::new(geometry).unwrap();
        Self {
            server,
            runtime,
            directory: tempfile::tempdir().unwrap(),
            listening: Mutex::new(Vec::new()),
            boots: AtomicU32::new(0),
            modules,
            checks,
            cpus: std::env::var("KERF_GUEST_CPUS").map_or(1, |cpus| cpus.parse().unwrap()),
            program: None,
        }
    }

    /// Its guests have so many CPUs; else 1, or what `KERF_GUEST_CPUS` says.
    pub(crate) fn cpus(self, cpus: u32) -> Self {
        Self { cpus, ..self }
    }

    /// Its guests have `program`, statically linked, below its own name in their root, and what drives their network card.
    pub(crate) fn with_program(self, program: PathBuf) -> Self {
        Self {
            program: Some(program),
            ..self
        }
    }

    /// A name for a socket of a guest's devices.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn server(&self) -> DoorbellServer {
        self.server.clone()
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(crate) fn region(&self) -> &Region<Mapped> {
        self.server.region()
    }

    pub(crate) fn ring(&self, peer: u32) {
        self.server.ring(peer, HOST);
    }

    /// Where the ring of a pair begins.
    fn ring_at(&self, from: u32, to: u32) -> u64 {
        let geometry = self.region().geometry();
        let peers = u64::from(geometry.peers());
        let rings = (4096 + peers * 256).next_multiple_of(4096);
        let stride = (geometry.region_size() - rings) / peers / peers;
        rings + (u64::from(from) * peers + u64::from(to)) * stride
    }

    /// Slots that were published in the ring of a pair.
    pub(crate) fn head(&self, from: u32, to: u32) -> u32 {
        self.region()
            .memory()
            .load32(self.ring_at(from, to), Relaxed)
    }

    /// Whether the receiver has taken all that was published in the ring of a pair.
    pub(crate) fn is_taken(&self, from: u32, to: u32) -> bool {
        let tail = self.ring_at(from, to) + 128;
        self.region().memory().load32(tail, Relaxed) == self.head(from, to)
    }

    /// Garbage in one of the words that `from` owns towards `to`, chosen by `random`.
    pub(crate) fn scribble(&self, from: u32, to: u32, random: u64) {
        let ring = |from, to| self.ring_at(from, to);
        let word = match random >> 60 {
            0..4 => ring(from, to),
            4 => ring(from, to) + 4,
            5..8 => ring(to, from) + 128,
            8..10 => ring(to, from) + 132,
            10 => ring(to, from) + 136,
            _ => ring(from, to) + 256 + (random >> 40 & 63) * 8,
        };
        let value = u32::try_from(random >> 16 & 0xffff).unwrap();
        let value = if random & 1 == 0 { value & 0x3f } else { value };
        self.region().memory().store32(word, value, Relaxed);
    }

    /// More packets in the ring of a pair than it can hold.
    pub(crate) fn spoil_ring(&self, from: u32, to: u32) {
        let head = self.ring_at(from, to);
        self.region().memory().store32(head, SLOTS * 1000, Relaxed);
    }

    /// States in the entry of `peer` that it has left.
    pub(crate) fn spoil_entry(&self, peer: u32) {
        const LEFT: u32 = 3;
        let state = 4096 + u64::from(peer) * 256;
        self.region().memory().store32(state, LEFT, Relaxed);
    }

    /// A guest without the shared memory.
    pub(crate) fn alone(&self, series: &str, commands: &[&str]) -> Guest {
        self.boot(series, commands, &[])
    }

    /// The guest with the number `peer`.
    pub(crate) fn guest(&self, peer: u32, series: &str, commands: &[&str]) -> Guest {
        self.guest_with(peer, series, commands, &[])
    }

    /// The guest with the number `peer`, and devices besides.
    pub(crate) fn guest_with(
        &self,
        peer: u32,
        series: &str,
        commands: &[&str],
        devices: &[&str],
    ) -> Guest {
        let socket = self.directory.path().join(format!("peer-{peer}"));
        if !socket.exists() {
            let _inside = self.runtime.enter();
            let listening = self.server.listen(peer, &socket).unwrap();
            self.listening.lock().unwrap().push(listening);
        }
        let vectors = self.server.vectors();
        let chardev = format!("socket,path={},id=kerf", socket.display());
        let device = format!("ivshmem-doorbell,vectors={vectors},chardev=kerf");
        let mut all = vec!["-chardev", &chardev, "-device", &device];
        all.extend(devices);
        self.boot(series, commands, &all)
    }

    /// A guest that was lent this memory, by a device without a doorbell.
    pub(crate) fn borrower(&self, memory: &SharedMemory, series: &str, commands: &[&str]) -> Guest {
        let backend = format!(
            "memory-backend-file,id=lent,mem-path=/proc/{}/fd/{},share=on,readonly=on,size={}",
            std::process::id(),
            memory.as_fd().as_raw_fd(),
            memory.size()
        );
        let device = "ivshmem-plain,memdev=lent";
        self.boot(series, commands, &["-object", &backend, "-device", device])
    }

    fn boot(&self, series: &str, commands: &[&str], devices: &[&str]) -> Guest {
        let release = release(series);
        let kernel = cache().join("kernels").join(&release).join("vmlinuz");
        // Reports of such a kernel are warnings, and what it checks with takes memory.
        let (checks, memory, log) = if series.starts_with("debug-") {
            (DEBUG_CHECKS, "768M", "loglevel=5")
        } else {
            (self.checks, "256M", "quiet")
        };
        let append = format!(
            "console=ttyS0 {log} panic=-1 oops=panic {CLOCK} {checks} -- {}",
            commands.join(" ")
        );
        assert!(append.len() < 2000, "too long for a kernel's command line");
        let number = self.boots.fetch_add(1, Relaxed);
        let qmp = self.directory.path().join(format!("qmp-{number}"));
        let sleeps = Sleeps::of(&qmp);
        let mut child = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-machine", "q35,usb=off"])
            .args(["-accel", "tcg,tb-size=96", "-m", memory, "-serial", "stdio"])
            .args(["-smp", &self.cpus.to_string()])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(image(
                series,
                &release,
                &self.modules,
                self.program.as_deref(),
            ))
            .args(["-append", &append])
            .args(devices)
            .args(["-qmp", &format!("unix:{}", qmp.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n') {
                let Ok(line) = line else { break };
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    break;
                }
            }
        });
        Guest {
            child,
            lines,
            said: Vec::new(),
            sleeps,
        }
    }
}

/// A running guest. Dropping it kills it.
pub(crate) struct Guest {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
    sleeps: Sleeps,
}

impl Guest {
    /// Waits until it has said a line that begins so.
    pub(crate) fn wait_for(&mut self, start: &str) {
        self.wait(start, PATIENCE, false);
    }

    /// Waits until it has said a line that begins so, as long as it says anything every `silence`.
    pub(crate) fn wait_while_it_speaks(&mut self, start: &str, silence: Duration) {
        self.wait(start, silence, true);
    }

    fn wait(&mut self, start: &str, patience: Duration, any_line_counts: bool) {
        let mut begun = Instant::now();
        while !self.has_said(start) {
            match self.lines.recv_timeout(Duration::from_secs(1)) {
                Ok(line) => {
                    self.said.push(line);
                    if any_line_counts {
                        begun = Instant::now();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("it ended without {start:?}:\n{}", self.said.join("\n"))
                }
            }
            if begun.elapsed() > patience {
                let (slept, said) = (self.sleeps(), self.said.join("\n"));
                panic!("no {start:?} in {patience:?}; woken {slept} times; it has said:\n{said}");
            }
        }
    }

    /// Whether it has said a line that begins so; does not wait.
    pub(crate) fn has_said(&mut self, start: &str) -> bool {
        self.said.extend(self.lines.try_iter());
        self.said.iter().any(|line| line.starts_with(start))
    }

    /// How often it has slept and was woken.
    pub(crate) fn sleeps(&self) -> u32 {
        self.sleeps.count()
    }

    /// The lines that it has said.
    pub(crate) fn said(&self) -> &[String] {
        &self.said
    }

    /// What went wrong in it until now.
    pub(crate) fn failures(&mut self) -> Vec<String> {
        self.said.extend(self.lines.try_iter());
        for line in self.said.iter().filter(|l| l.starts_with("KERF info")) {
            println!("{line}");
        }
        let bad =
            |line: &&String| line.starts_with("KERF failed") || line.starts_with("KERF panic");
        let mut all: Vec<String> = self.said.iter().filter(bad).cloned().collect();
        all.extend(reports(&self.said));
        all
    }

    /// What its QEMU has had of the host's CPUs, in all threads.
    pub(crate) fn cpu_time(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let nanoseconds = tasks.map(|task| {
            // A thread may just have ended.
            let text = std::fs::read_to_string(task.unwrap().path().join("schedstat"));
            text.map_or(0, |text| text.split(' ').next().unwrap().parse().unwrap())
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Stops all threads of the guest, and returns when none runs. Its connection stays.
    pub(crate) fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        let stopped = waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(stopped, WaitStatus::Stopped(self.pid(), Signal::SIGSTOP));
    }

    /// Lets a stopped guest run again.
    pub(crate) fn resume(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            return;
        }
        self.said.extend(self.lines.iter());
        assert_eq!(reports(&self.said), Vec::<String>::new());
    }
}
