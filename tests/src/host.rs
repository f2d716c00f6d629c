//! One daemon with directories, processes and ports of its own. All of them are removed on drop, and also when the test
//! itself is killed: a guard process sees its pipe close.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kmorph_control_api::{InstanceStatus, Operation};
use kmorph_emulated_kernel::{Generation, Process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Control, kernels};

/// Maximum wait for any condition. Only a failing test waits so long; a guest in software emulation on a busy machine
/// takes a minute to boot, and another minute for a capture.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// A heartbeat timeout of one second, and a pool with ample resources.
const DEFAULT_CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n";

/// Returns the path of a program of this workspace, next to the running program.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("the own program has a path");
    let dirs = own.ancestors().skip(1).take(2);
    let found = dirs.map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built: cargo build --workspace"))
}

/// One daemon; see the module.
#[derive(Debug)]
pub struct Host {
    dir: TempDir,
    guard: Option<Child>,
    daemon: Option<Child>,
    control: Control,
    /// The emulated kernel beside which instances run, if any.
    kernel: Option<Process>,
    /// Additional environment of the daemon.
    env: Vec<(&'static str, PathBuf)>,
}

impl Host {
    /// Like [`Host::new`], with morphs by rounds.
    pub fn in_rounds() -> Self {
        Self::with(&format!("{DEFAULT_CONFIG}[morph]\nmode = \"rounds\"\n"))
    }

    /// Starts a daemon with a heartbeat timeout of one second and a pool with ample resources.
    pub fn new() -> Self {
        Self::with(DEFAULT_CONFIG)
    }

    /// Starts a daemon whose instances are real kernels in QEMU. Requires the packages and kernels of
    /// `scripts/setup-tests`.
    pub fn qemu() -> Self {
        Self::qemu_over(kernels::Transport::Virtio)
    }

    /// Like [`Host::qemu`], with this transport for vsock.
    pub fn qemu_over(transport: kernels::Transport) -> Self {
        let transport = transport.as_str();
        Self::with(&format!(
            "backend = \"qemu\"\n{DEFAULT_CONFIG}[qemu]\ntransport = \"{transport}\"\n"
        ))
    }

    /// Starts a daemon whose instances are kernels beside an emulated kernel of this generation; `None` if this machine
    /// cannot emulate that kernel.
    pub fn multikernel(generation: Generation) -> Option<Self> {
        let config = "[defaults]\nheartbeat_timeout_s = 1.0\n[limits]\nstop_timeout_s = 0.5\n";
        let mut host = Self::prepare_multikernel(generation, config)?;
        host.start();
        Some(host)
    }

    /// Like [`Host::multikernel`], but does not start the daemon. `config` is added to the settings for the emulated
    /// kernel.
    pub fn prepare_multikernel(generation: Generation, config: &str) -> Option<Self> {
        if !Process::is_possible() {
            return None;
        }
        let mut host = Self::prepare("");
        let place = host.path("kernel");
        std::fs::create_dir(&place).expect("a directory can be made");
        let emulator = program("kmorph-emulated-kernel");
        let kernel = Process::start(&emulator, &place, &program("kmorph-agent"), generation);
        let tree = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../libkerf/tests/trees/baseline.dts"
        );
        let tree = std::fs::read_to_string(tree).expect("the tree can be read");
        let baseline = libkerf::dts::read(&tree).expect("the tree is sound");
        libkerf::kernel::Kernel::at(kernel.root(), kernel.beside("run/kerf.lock"))
            .write_baseline(&baseline, libkerf::check::Context::default())
            .expect("the kernel takes the baseline");
        host.kernel = Some(kernel);
        host.configure(&format!(
            "backend = \"multikernel\"\n{config}[multikernel]\n\
             root = \"{0}/multikernel\"\nlock = \"{0}/run/kerf.lock\"\nrecords = \"{0}/records\"\n\
             vsock_sockets = \"{0}/vsock\"\nlayout = \"assumed\"\n\
             iomem = \"{0}/iomem\"\nkcore = \"{0}/kcore\"\n",
            place.display()
        ));
        Some(host)
    }

    /// Returns the process of the emulated kernel.
    pub fn emulated(&self) -> &Process {
        self.kernel.as_ref().expect("the kernel is emulated")
    }

    /// Starts a daemon with this configuration; `[paths]` is added.
    pub fn with(config: &str) -> Self {
        let mut host = Self::prepare(config);
        host.start();
        host
    }

    /// Like [`Host::with`], with `kmorph-test-hostile-agent` as the agent.
    pub fn with_hostile_agents(config: &str) -> Self {
        let mut host = Self::prepare("");
        let text = std::fs::read_to_string(host.config_path()).expect("it was just written");
        let agent = program("kmorph-test-hostile-agent");
        let text = format!("{config}{text}agent = {agent:?}\n");
        std::fs::write(host.config_path(), text).expect("the configuration can be written");
        host.start();
        host
    }

    /// Like [`Host::with`], but does not start the daemon.
    pub fn prepare(config: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kmorph-")
            .tempdir()
            .expect("a temporary directory");
        let guard = Command::new(program("kmorph-test-guard"))
            .arg(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("the guard starts");
        let control = Control::new(dir.path().join("run/kmorphd.sock"));
        let host = Self {
            dir,
            guard: Some(guard),
            daemon: None,
            control,
            kernel: None,
            env: Vec::new(),
        };
        host.configure(config);
        host
    }

    /// Replaces the configuration file.
    pub fn configure(&self, config: &str) {
        let dir = self.dir.path().display();
        // The shared cache keeps few guest images, and needs its space for kernels that really boot.
        let cache = match self.kernel {
            Some(_) => self.path("cache"),
            None => kernels::cache(),
        };
        let text = format!(
            "{config}\n[paths]\nstate_dir = \"{dir}/state\"\nrun_dir = \"{dir}/run\"\n\
             socket = \"{dir}/run/kmorphd.sock\"\ncache_dir = \"{}\"\n",
            cache.display()
        );
        std::fs::write(self.config_path(), text).expect("the configuration can be written");
    }

    /// Returns the path of the configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.path("kmorphd.conf")
    }

    /// Returns a path in the temporary directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the command that starts the daemon.
    pub fn command(&self) -> Command {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("kmorphd.log"))
            .expect("the log can be opened");
        let errors = log.try_clone().expect("a descriptor is left");
        let mut command = match &self.kernel {
            None => Command::new(program("kmorphd")),
            Some(kernel) => kernel.under(&program("kmorph-emulated-kernel"), &program("kmorphd")),
        };
        command
            .arg("--config")
            .arg(self.config_path())
            .env("KMORPH_FAULTS", self.path("faults"))
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        command
    }

    /// Adds a variable to the daemon's environment at its start.
    pub fn set_env(&mut self, name: &'static str, value: impl Into<PathBuf>) {
        self.env.push((name, value.into()));
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) {
        let mut daemon = self.command().spawn().expect("kmorphd starts");
        let begun = Instant::now();
        while self
            .control
            .try_request("GET", "/v1/daemon", None)
            .is_none()
        {
            if let Ok(Some(status)) = daemon.try_wait() {
                panic!("kmorphd ended with {status}:\n{}", self.log());
            }
            assert!(begun.elapsed() < DEADLINE, "kmorphd does not answer");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.daemon = Some(daemon);
    }

    /// Returns the process ID of the daemon.
    pub fn daemon_pid(&self) -> i32 {
        let daemon = self.daemon.as_ref().expect("the daemon runs");
        i32::try_from(daemon.id()).expect("a pid fits")
    }

    /// Kills the daemon with SIGKILL.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().expect("the daemon can be killed");
            daemon.wait().expect("the daemon can be waited for");
        }
    }

    /// Starts the daemon, which must refuse to run, and returns its output.
    pub fn refused_start(&self, args: &[&std::ffi::OsStr]) -> String {
        let mut command = self.command();
        let spawned = command.args(args).stderr(Stdio::piped()).spawn();
        let mut daemon = spawned.expect("kmorphd starts");
        let ended = self.control.wait("the daemon to refuse", || {
            daemon.try_wait().expect("it can be waited for")
        });
        let mut text = String::new();
        let mut errors = daemon.stderr.take().expect("it is a pipe");
        std::io::Read::read_to_string(&mut errors, &mut text).expect("it speaks UTF-8");
        assert_eq!(ended.code(), Some(1), "{text}");
        text
    }

    /// Waits until the daemon exits on its own, and returns its exit status.
    pub fn daemon_ended(&mut self) -> std::process::ExitStatus {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        self.control.wait("the daemon to end", || {
            daemon.try_wait().expect("it can be waited for")
        })
    }

    /// Makes the next actor that passes the point `name` panic, and waits for the panic. See the `fault` module of the
    /// actors; `provoke` makes an actor pass the point.
    pub fn panic_at(&self, name: &str, provoke: impl FnOnce()) {
        let file = self.path("faults").join(name);
        std::fs::create_dir_all(self.path("faults")).expect("a directory can be made");
        std::fs::write(&file, "").expect("a file can be written");
        provoke();
        self.control
            .wait("the panic", || (!file.exists()).then_some(()));
    }

    /// Kills the daemon immediately before the step `name`, and waits for its death. See the `fault` module of the
    /// actors; `provoke` makes the daemon take the step. Returns false if the daemon does not reach the step `within`
    /// that time.
    pub fn die_before(
        &mut self,
        name: &str,
        within: Duration,
        provoke: impl FnOnce(&Self),
    ) -> bool {
        let file = self.path("faults").join(format!("die before {name}"));
        std::fs::create_dir_all(self.path("faults")).expect("a directory can be made");
        std::fs::write(&file, "").expect("a file can be written");
        provoke(self);
        let begun = Instant::now();
        while file.exists() && begun.elapsed() < within {
            std::thread::sleep(Duration::from_millis(2));
        }
        let died = std::fs::remove_file(&file).is_err();
        if died {
            self.daemon_ended();
        }
        died
    }

    /// Kills the daemon and starts a new one.
    pub fn restart_by_kill(&mut self) {
        self.kill_daemon();
        self.start();
    }

    /// Asks the daemon to exit and starts a new one; the old daemon writes its pending state first.
    pub fn restart(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.daemon_pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)
            .expect("the daemon can be sent a signal");
        let ended = self.daemon_ended();
        assert!(ended.success(), "{ended:?}\n{}", self.log());
        self.start();
    }

    /// Returns the client of the control API.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Returns the daemon's log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("kmorphd.log")).unwrap_or_default()
    }

    /// Returns the logs of every generation.
    fn instance_logs(&self) -> String {
        let below = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
        let generations = below(self.path("run/instances")).flat_map(|name| below(name.path()));
        let files = generations.flat_map(|generation| below(generation.path()));
        let mut text = String::new();
        for path in files.map(|file| file.path()) {
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

    /// Creates a kernel image with this release.
    pub fn kernel(&self, release: &str) -> PathBuf {
        let path = self.path(&format!("vmlinuz-{release}"));
        std::fs::write(&path, kmorph_backends::kernel_image::synthetic(release))
            .expect("an image can be written");
        path
    }

    /// Spawns `name` with the key-value server and waits until it is healthy. Returns its port.
    pub fn spawn_kv(&self, name: &str) -> u16 {
        self.spawn_kv_with(name, &[])
    }

    /// Like [`Host::spawn_kv`], with arguments for the server.
    pub fn spawn_kv_with(&self, name: &str, args: &[&str]) -> u16 {
        let body = json!({
            "name": name,
            "kernel": self.kernel("6.1.0-a"),
            "workload": { "program": "kmorph-kv", "args": args },
            "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
        });
        self.control.succeed("POST", "/v1/instances", Some(&body));
        published(&self.control.instance(name))
    }

    /// Like [`Host::spawn_kv`], on this kernel.
    pub fn spawn_kv_on(&self, name: &str, kernel: &Path, cmdline: &str) -> u16 {
        let body = json!({
            "name": name,
            "kernel": kernel,
            "kernel_cmdline": cmdline,
            "workload": { "program": "kmorph-kv", "args": [] },
            "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
        });
        self.control.succeed("POST", "/v1/instances", Some(&body));
        published(&self.control.instance(name))
    }

    /// Spawns `name` without a program.
    pub fn spawn_bare(&self, name: &str) -> Operation {
        let body: Value = json!({ "name": name, "kernel": self.kernel("6.1.0-a") });
        self.control.succeed("POST", "/v1/instances", Some(&body))
    }

    /// Returns the process ID of the agent of the active generation of `name`.
    pub fn agent(&self, name: &str) -> i32 {
        self.control.instance(name).processes["agent"]
    }

    /// Waits until `name` runs; on a busy machine, the detector may briefly suspect the instance without a failure.
    pub fn running(&self, name: &str) -> InstanceStatus {
        self.control.wait("it to run", || {
            let now = self.control.instance(name);
            let running = now.summary.state == kmorph_control_api::InstanceState::Running;
            running.then_some(now)
        })
    }

    /// Waits until `name` runs in a later generation than `generation`.
    pub fn successor_of(&self, name: &str, generation: u64) -> InstanceStatus {
        self.control.wait("a successor", || {
            let now = self.control.instance(name);
            let running = now.summary.state == kmorph_control_api::InstanceState::Running;
            (running && now.summary.generation > generation).then_some(now)
        })
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns a workload that serves in generation 1, and exits with status 1 in every later one.
pub fn starts_once() -> Value {
    let script = "[ \"$KMORPH_GENERATION\" = 1 ] && exec sleep 100000; exit 1";
    json!({ "program": "/bin/sh", "args": ["-c", script] })
}

/// Returns the host port of the first published port.
pub fn published(instance: &InstanceStatus) -> u16 {
    let listen = &instance.summary.published[0].listen;
    let (_, port) = listen.rsplit_once(':').expect("an address has a port");
    port.parse().expect("a port is a number")
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "--- kmorphd.log\n{}", self.log());
            let _ = writeln!(std::io::stderr(), "{}", self.instance_logs());
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // The guard also ends the emulated kernel, once its last user has ended: a daemon that this host did not start
        // may still be running.
        if let Some(mut guard) = self.guard.take() {
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
        drop(self.kernel.take());
    }
}
