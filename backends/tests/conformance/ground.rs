//! A ground for a backend's tests: directories, kernels and processes of its own, all removed on drop, and also when
//! the test is killed.

use std::ffi::CStr;
use std::future::Future;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kmorph_backends::cgroup::{Cgroups, NoCgroups};
use kmorph_backends::contract::{
    Backend, ExitCause, MemoryRange, Observation, Placement, SpawnSpec,
};
use kmorph_backends::embedded::{EmbeddedBackend, EmbeddedConfig};
use kmorph_backends::kernel_image::{KernelImage, synthetic};
use kmorph_backends::multikernel::{
    HostMemory, Layout, MultikernelBackend, MultikernelConfig, Vsock,
};
use kmorph_backends::qemu::{AccelChoice, KerfConfig, QemuBackend, QemuConfig};
use kmorph_control_api::paths::DefaultPaths;
use kmorph_emulated_kernel::{Generation, Process};
use kmorph_launch::{StartMode, WorkloadSpec};
use kmp_proto::auth::Key;
use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};
use kmp_proto::message::{Channel, Hello, HelloFixed, PeerRole};
use kmp_proto::wire::VERSION;
use kmp_transport::connection::greet;
use kmp_transport::link::{Address, BoxedLink, KMP_PORT, connect};
use kmp_transport::speaker::Speaker;
use libkerf::check::Context;
use libkerf::kernel::{Calls, Kernel};
use rustix::process::{Pid, Signal, kill_process};

/// Maximum wait for any condition.
const DEADLINE: Duration = Duration::from_secs(90);
/// Interval between two checks.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Memory of an instance, bytes: enough for a kernel.
const MEMORY_BYTES: u64 = 192 << 20;

/// A ground; see the module.
pub(crate) struct Ground {
    pub(crate) backend: Arc<dyn Backend>,
    make: Box<dyn Fn() -> Arc<dyn Backend>>,
    /// The emulated kernel that runs the instances, if any.
    pub(crate) emulated: Option<Process>,
    /// Configuration and calls for backends on the emulated kernel.
    beside: Option<(MultikernelConfig, Emulated)>,
    kernel: PathBuf,
    dir: tempfile::TempDir,
    guard: Child,
    generation: AtomicU64,
}

impl Ground {
    /// Processes in cgroups, if cgroups are usable.
    pub(crate) fn embedded() -> Self {
        Self::processes(Cgroups::find_limiting_memory)
    }

    /// Processes without cgroups, as on a machine without usable cgroups.
    pub(crate) fn embedded_uncontained() -> Self {
        Self::processes(|_| Err(NoCgroups::because("this test does without")))
    }

    fn processes(cgroups: fn(&Path) -> Result<Cgroups, NoCgroups>) -> Self {
        let dir = temporary();
        let kernel = dir.path().join("vmlinuz");
        std::fs::write(&kernel, synthetic("6.1.0-test")).unwrap();
        let run_dir = dir.path().to_owned();
        let make = move || -> Arc<dyn Backend> {
            let config = EmbeddedConfig {
                agent: program("kmorph-agent"),
                cgroups: Arc::new(cgroups(&run_dir)),
            };
            Arc::new(EmbeddedBackend::new(config).unwrap())
        };
        Self::with(dir, kernel, Box::new(make))
    }

    pub(crate) fn qemu() -> Self {
        Self::guests("6.1", |_| None)
    }

    /// An emulated kernel beside the host's; `None` if this machine cannot emulate a kernel.
    pub(crate) fn multikernel(generation: Generation) -> Option<Self> {
        if !Process::is_possible() {
            return None;
        }
        let ground = Self::without_pool(generation);
        let emulated = ground.emulated.as_ref().unwrap();
        let tree = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../libkerf/tests/trees/baseline.dts"
        );
        let baseline = libkerf::dts::read(&std::fs::read_to_string(tree).unwrap()).unwrap();
        Kernel::at(emulated.root(), emulated.beside("run/kerf.lock"))
            .write_baseline(&baseline, Context::default())
            .unwrap();
        Some(ground)
    }

    /// Like [`Ground::multikernel`] on a machine that can emulate a kernel, but before `kerf init`.
    pub(crate) fn without_pool(generation: Generation) -> Self {
        let dir = temporary();
        let place = dir.path().join("kernel");
        std::fs::create_dir(&place).unwrap();
        let kernel = dir.path().join("vmlinuz");
        std::fs::write(&kernel, synthetic("6.1.0-test")).unwrap();
        let config = MultikernelConfig {
            agent: program("kmorph-agent"),
            root: place.join("multikernel"),
            lock: place.join("run/kerf.lock"),
            records: place.join("records"),
            modules: None,
            cache: dir.path().join("cache"),
            vsock: Vsock::Sockets {
                directory: place.join("vsock"),
            },
            // Emulated kernels share no memory.
            layout: Layout::Assumed,
            memory: HostMemory::default(),
            xdp_pins: place.join("xdp"),
        };
        let calls = Emulated(place.clone());
        let beside = (config.clone(), calls.clone());
        let own = config.clone();
        let make = move || -> Arc<dyn Backend> {
            let calls = Box::new(calls.clone());
            Arc::new(MultikernelBackend::with_calls(own.clone(), calls).unwrap())
        };
        // The guard starts first, because it ends the emulator if the test is killed.
        let mut ground = Self::with(dir, kernel, Box::new(make));
        let emulator = program("kmorph-emulated-kernel");
        let emulated = Process::start(&emulator, &place, &config.agent, generation);
        ground.emulated = Some(emulated);
        ground.beside = Some(beside);
        ground
    }

    /// Returns another backend on the same emulated kernel, with the configuration changed by `change`.
    pub(crate) fn backend_with(&self, change: impl FnOnce(&mut MultikernelConfig)) -> impl Backend {
        let (mut config, calls) = self.beside.clone().unwrap();
        change(&mut config);
        MultikernelBackend::with_calls(config, Box::new(calls)).unwrap()
    }

    /// QEMU guests over kerf-vsock, with Debian's kernel of this series.
    pub(crate) fn kerf(series: &str) -> Self {
        Self::guests(series, |cache| {
            Some(KerfConfig {
                program: program("kmorph-kerf-host"),
                modules: cache.join("kmod"),
            })
        })
    }

    fn guests(series: &str, kerf: fn(&Path) -> Option<KerfConfig>) -> Self {
        let cache = cache();
        let release = std::fs::read_to_string(cache.join("kernels").join(series))
            .unwrap_or_else(|e| panic!("no kernel in {cache:?} ({e}): run scripts/setup-tests"));
        let kernel = cache.join("kernels").join(release.trim()).join("vmlinuz");
        let dir = temporary();
        let run_dir = dir.path().to_owned();
        let make = move || -> Arc<dyn Backend> {
            let config = QemuConfig {
                agent: program("kmorph-agent"),
                program: "qemu-system-x86_64".into(),
                vhost_vsock: cache.join("tools/bin/vhost-device-vsock"),
                kerf: kerf(&cache),
                accel: AccelChoice::Auto,
                modules: None,
                cache: cache.clone(),
                cgroups: Arc::new(Cgroups::find(&run_dir)),
            };
            Arc::new(QemuBackend::new(config).unwrap())
        };
        Self::with(dir, kernel, Box::new(make))
    }

    fn with(
        dir: tempfile::TempDir,
        kernel: PathBuf,
        make: Box<dyn Fn() -> Arc<dyn Backend>>,
    ) -> Self {
        let guard = Command::new(program("kmorph-test-guard"))
            .arg(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            backend: make(),
            make,
            emulated: None,
            beside: None,
            kernel,
            dir,
            guard,
            generation: AtomicU64::new(1),
        }
    }

    /// Returns a directory for files.
    pub(crate) fn run_dir(&self) -> &Path {
        self.dir.path()
    }

    /// Kills an instance, and returns the expected cause of its end.
    pub(crate) fn kill(&self, placement: &Placement) -> ExitCause {
        if let Some(emulated) = &self.emulated {
            emulated.strike("panic", kernel_instance(placement));
            return ExitCause::KernelPanicked;
        }
        signal(placement, Signal::KILL);
        ExitCause::Signal { signal: 9 }
    }

    /// Stops all execution of an instance, and returns the expected observation.
    pub(crate) fn stop(&self, placement: &Placement) -> Observation {
        if let Some(emulated) = &self.emulated {
            emulated.strike("hang", kernel_instance(placement));
            // A kernel that hangs has the status of a kernel that runs.
            return Observation::Running;
        }
        signal(placement, Signal::STOP);
        Observation::Stopped
    }

    /// Returns true if any part of a generation can still run.
    pub(crate) fn lives(&self, placement: &Placement) -> bool {
        match &self.emulated {
            Some(emulated) => emulated.strike("running", kernel_instance(placement)) != "0",
            None => !self.processes_of(&placement.run_dir).is_empty(),
        }
    }

    /// Returns the fence method for a generation that runs.
    pub(crate) fn stops_by(&self) -> FenceMethod {
        match self.emulated {
            Some(_) => FenceMethod::HaltedByForce,
            None => FenceMethod::ProcessesKilled,
        }
    }

    /// Returns the confirmation of its end.
    pub(crate) fn confirms_by(&self) -> Confirmation {
        match self.emulated {
            Some(_) => Confirmation::CpusParked,
            None => Confirmation::ProcessesGone,
        }
    }

    /// Returns the backend of another daemon process.
    pub(crate) fn another_daemon(&self) -> Arc<dyn Backend> {
        (self.make)()
    }

    /// Returns a spec for an instance without a workload.
    pub(crate) fn spec(&self) -> SpawnSpec {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed);
        SpawnSpec {
            name: "web".parse().unwrap(),
            generation,
            kernel: KernelImage::read(&self.kernel).unwrap(),
            cmdline: String::new(),
            initramfs: None,
            cpus: vec![0],
            memory_bytes: MEMORY_BYTES,
            workload: None,
            ports: Vec::new(),
            listeners: Vec::new(),
            start: StartMode::Fresh,
            predecessor: None,
            run_dir: self.dir.path().join(generation.to_string()),
            cid: 3 + u32::try_from(generation).unwrap(),
        }
    }

    /// Returns the key-value server as a workload.
    pub(crate) fn kv(&self) -> WorkloadSpec {
        self.workload("kmorph-kv")
    }

    /// Returns a program of this workspace as a workload.
    pub(crate) fn workload(&self, name: &str) -> WorkloadSpec {
        WorkloadSpec {
            program: program(name),
            args: Vec::new(),
            env: std::collections::BTreeMap::new(),
            restart: kmorph_launch::WorkloadRestart::default(),
        }
    }

    pub(crate) async fn spawn(&self, spec: SpawnSpec) -> Placement {
        let spawned = self.in_time(self.backend.spawn(spec), "the spawn").await;
        spawned.unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) async fn fence(&self, placement: &Placement) -> FenceCertificate {
        let order = FenceOrder::new(placement.generation);
        let fenced = self.backend.fence(placement, order).await;
        fenced.unwrap_or_else(|error| panic!("{error}")).certificate
    }

    /// Waits until the agent of this generation answers a HELLO.
    pub(crate) async fn answers(&self, placement: &Placement) {
        let hello = Hello {
            fixed: HelloFixed {
                version_min: VERSION,
                version_max: VERSION,
                role: PeerRole::Daemon,
                channel: Channel::Control,
                flags: 0,
                generation: placement.generation,
                boot_id: [7; 16],
                features: 0,
                session: 0,
                incarnation: 0,
            },
            instance: placement.name.to_string(),
            kernel_release: String::new(),
            agent_version: String::new(),
            nonce: None,
            proof: None,
        };
        let secret = kmorph_backends::key::of(placement).unwrap();
        let speaker = Speaker::with_key(hello, Key::new(secret.bytes()));
        let answered = async {
            loop {
                if let Some(link) = reach(placement, KMP_PORT).await
                    && greet(link, &speaker).await.is_ok()
                {
                    return;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        self.in_time(answered, "an answer of the agent").await;
    }

    /// Connects to a port of the instance, as soon as the port accepts.
    pub(crate) async fn port(&self, placement: &Placement, port: u32) -> BoxedLink {
        let connected = async {
            loop {
                if let Some(link) = reach(placement, port).await {
                    return link;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        self.in_time(connected, "a connection").await
    }

    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = T>, what: &str) -> T {
        match tokio::time::timeout(DEADLINE, work).await {
            Ok(done) => done,
            Err(_) => panic!("waited {DEADLINE:?} for {what}:\n{}", self.logs()),
        }
    }

    fn logs(&self) -> String {
        let mut text = String::new();
        let generations = std::fs::read_dir(self.dir.path()).unwrap().flatten();
        for file in generations.flat_map(|g| std::fs::read_dir(g.path()).into_iter().flatten()) {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|e| e == "log") {
                let log = std::fs::read(&path).unwrap_or_default();
                text.push_str(&format!(
                    "--- {path:?}\n{}\n",
                    String::from_utf8_lossy(&log)
                ));
            }
        }
        text
    }

    /// Returns the processes with a generation's directory in their command line or environment.
    pub(crate) fn processes_of(&self, run_dir: &Path) -> Vec<u32> {
        let wanted = run_dir.as_os_str().as_encoded_bytes();
        let names = |pid: u32, file: &str| {
            let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            text.windows(wanted.len()).any(|part| part == wanted)
        };
        let own = [std::process::id(), self.guard.id()];
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| !own.contains(pid))
            .filter(|pid| names(*pid, "cmdline") || names(*pid, "environ"))
            .collect()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        drop(self.emulated.take());
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

fn signal(placement: &Placement, signal: Signal) {
    let pid = Pid::from_raw(placement.processes[0].pid).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Returns the name of the kernel instance.
pub(crate) fn kernel_instance(placement: &Placement) -> &str {
    &placement.kernel_instance.as_ref().unwrap().name
}

/// The system calls, answered by the emulated kernel in this directory instead of the kernel that runs the test.
#[derive(Clone)]
struct Emulated(PathBuf);

impl Emulated {
    fn ask(&self, line: &str) -> io::Result<()> {
        let done = kmorph_emulated_kernel::ask(&self.0, line);
        done.map(drop).map_err(io::Error::from_raw_os_error)
    }
}

impl Calls for Emulated {
    fn load(
        &self,
        id: u32,
        image: BorrowedFd<'_>,
        initrd: Option<BorrowedFd<'_>>,
        cmdline: &CStr,
    ) -> io::Result<()> {
        let path =
            |fd: BorrowedFd<'_>| format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        let initrd = initrd.map_or_else(|| "-".to_owned(), path);
        let cmdline = cmdline.to_str().unwrap();
        self.ask(&format!("load {id} {} {initrd} {cmdline}", path(image)))
    }

    fn unload(&self, id: u32) -> io::Result<()> {
        self.ask(&format!("unload {id}"))
    }

    fn reboot(&self, command: libkerf::kernel::Command, id: u32) -> io::Result<()> {
        self.ask(&format!("reboot {} {id}", command.code()))
    }
}

async fn reach(placement: &Placement, port: u32) -> Option<BoxedLink> {
    let address = Address::from(placement.endpoint.clone());
    connect(&address, port).await.ok()
}

fn temporary() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("kmorph-").tempdir().unwrap()
}

/// Returns the directory in which `scripts/setup-tests` stores kernels and the vsock device.
fn cache() -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    let default = || DefaultPaths::of(uid, |name| std::env::var_os(name)).cache_dir;
    let set = std::env::var_os("KMORPH_CACHE_DIR").filter(|dir| !dir.is_empty());
    set.map_or_else(default, Into::into)
}

/// Returns the path of a program of this workspace, in the parent of this test's directory.
fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap().join(name);
    assert!(
        path.is_file(),
        "{name} is not built: cargo build --workspace"
    );
    path
}

/// Sends a non-maskable interrupt to the guest: with `unknown_nmi_panic=1`, its kernel panics.
pub(crate) fn inject_nmi(placement: &Placement) {
    let mut qmp = UnixStream::connect(placement.run_dir.join("qmp.sock")).unwrap();
    let mut said = BufReader::new(qmp.try_clone().unwrap()).lines();
    for command in ["qmp_capabilities", "inject-nmi"] {
        writeln!(qmp, "{{\"execute\": \"{command}\"}}").unwrap();
        let done = said.any(|line| line.unwrap().starts_with("{\"return\""));
        assert!(done, "QEMU hung up");
    }
}

/// Returns true if the memory contains these bytes.
pub(crate) fn holds(ranges: &[MemoryRange], bytes: &[u8]) -> bool {
    const BLOCK: usize = 4 << 20;
    let mut block = vec![0; BLOCK];
    ranges.iter().any(|range| {
        let file = std::fs::File::open(&range.host_path).unwrap();
        (0..range.length).step_by(BLOCK).any(|at| {
            let length = file.read_at(&mut block, range.host_offset + at).unwrap();
            block[..length]
                .windows(bytes.len())
                .any(|part| part == bytes)
        })
    })
}
