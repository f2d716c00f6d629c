//! The differences of the backends: configuration, kernels, and ways to harm an instance.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kmorph_control_api::InstanceStatus;
use kmorph_emulated_kernel::{Generation, Process};
use kmorph_tests::{Host, kernels};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::shell::quoted;
use crate::stage::Stage;
use crate::trouble::Trouble;

/// The kind of the instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// Processes of this machine: no root, no download
    Embedded,
    /// Linux 6.1, 6.12 and 7.3 in QEMU
    Qemu,
    /// Kernels beside the host's, with the host's kernel emulated: root and /dev/fuse, no download
    Multikernel,
}

/// A kind of harm to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// The instance dies at once.
    Dies,
    /// The instance still exists, but executes nothing.
    Hangs,
}

/// The setting of a backend; see the module.
pub(crate) struct Setting {
    backend: Backend,
    /// Image of the kernel on which the instance starts.
    pub(crate) old_kernel: PathBuf,
    /// Images of the kernels to which the instance is morphed, in order.
    pub(crate) newer_kernels: Vec<PathBuf>,
    /// Directory of the emulated host kernel.
    emulated: PathBuf,
}

const EMBEDDED_CONFIG: &str = "[defaults]\nheartbeat_timeout_s = 1.0\n";
/// A longer timeout: a guest in software emulation on a busy machine may well be late.
const QEMU_CONFIG: &str = "backend = \"qemu\"\n[defaults]\nheartbeat_timeout_s = 2.0\n\
                           [limits]\nstart_timeout_s = 120.0\n";

const MULTIKERNEL_CONFIG: &str =
    "[defaults]\nheartbeat_timeout_s = 1.0\n[limits]\nstop_timeout_s = 1.0\n";

impl Backend {
    /// Prepares the host with the daemon's configuration; `transport` carries vsock to kernels in QEMU.
    pub(crate) fn host(self, transport: &str) -> Result<Host, Trouble> {
        match self {
            Self::Embedded => Ok(Host::prepare(EMBEDDED_CONFIG)),
            Self::Qemu => {
                let config = format!("{QEMU_CONFIG}[qemu]\ntransport = \"{transport}\"\n");
                Ok(Host::prepare(&config))
            }
            Self::Multikernel => {
                if let Some(obstacle) = Process::obstacle() {
                    let hint = hint();
                    return Err(Trouble::NotHere { obstacle, hint });
                }
                let host = Host::prepare_multikernel(Generation::Confirms, MULTIKERNEL_CONFIG);
                let text = || "what could be emulated just now cannot be any more".to_owned();
                host.ok_or_else(|| Trouble::NotAsTold(text()))
            }
        }
    }
}

impl Setting {
    /// Returns the setting for `backend` on `host`.
    pub(crate) fn of(backend: Backend, transport: &str, host: &Host) -> Result<Self, Trouble> {
        let (old_kernel, newer_kernels) = match backend {
            Backend::Embedded | Backend::Multikernel => {
                (host.kernel("6.1.0-demo"), vec![host.kernel("6.12.0-demo")])
            }
            Backend::Qemu => (fetched("6.1")?, newer_kernels(transport)?),
        };
        Ok(Self {
            backend,
            old_kernel,
            newer_kernels,
            emulated: host.path("kernel"),
        })
    }

    /// Returns a sentence that introduces the story.
    pub(crate) fn introduction(&self) -> &'static str {
        match self.backend {
            Backend::Embedded => {
                "Embedded backend: each instance is a process of this machine. It boots no kernel; it takes\n\
                 the kernel's version from the header of the image, and here both images are made up by the\n\
                 demo. `make demo BACKEND=qemu` tells the same with real Linux kernels."
            }
            Backend::Qemu => {
                "QEMU backend: each instance is a Linux kernel in a virtual machine, Debian's 6.1,\n\
                 6.12 and 7.3."
            }
            Backend::Multikernel => {
                "Multikernel backend: each instance is a kernel beside the host's. No such kernel is booted here:\n\
                 the host kernel's files and calls are emulated, an instance's agent is a process of this\n\
                 machine, vsock is a Unix socket, and both images are made up by the demo. The daemon, the\n\
                 agents and the server are those that run elsewhere."
            }
        }
    }

    /// Returns the launcher of the daemon: if the host's kernel is emulated, the launcher makes it answer the daemon's
    /// calls.
    pub(crate) fn launcher(&self) -> String {
        match self.backend {
            Backend::Embedded | Backend::Qemu => String::new(),
            Backend::Multikernel => {
                format!("kmorph-emulated-kernel under {} ", quoted(&self.emulated))
            }
        }
    }

    /// Returns the interval between two requests of the client. If connections are carried into a kernel, an answer
    /// takes a millisecond or more.
    pub(crate) fn pace(&self) -> Duration {
        match self.backend {
            Backend::Embedded => Duration::from_millis(1),
            Backend::Qemu | Backend::Multikernel => Duration::from_millis(5),
        }
    }

    /// Returns the number of 64-KiB values that the server holds during the morph.
    pub(crate) fn values(&self) -> usize {
        match self.backend {
            Backend::Embedded => 512,
            Backend::Qemu | Backend::Multikernel => 128,
        }
    }

    /// Returns the timeout for the instance to become healthy again.
    pub(crate) fn patience(&self) -> Duration {
        match self.backend {
            Backend::Embedded | Backend::Multikernel => Duration::from_secs(30),
            Backend::Qemu => Duration::from_secs(180),
        }
    }

    /// Returns additional arguments of `spawn`.
    pub(crate) fn spawn_words(&self) -> String {
        match self.backend {
            Backend::Embedded | Backend::Multikernel => String::new(),
            Backend::Qemu => format!(" --kernel-cmdline={}", kernels::PANICS_ON_NMI),
        }
    }

    /// Returns the downtime budget of the morph, milliseconds. A busy machine cannot always keep the default; the story
    /// must also work on such machines.
    pub(crate) fn downtime_budget_ms(&self) -> u32 {
        match self.backend {
            Backend::Embedded => 1_000,
            Backend::Qemu | Backend::Multikernel => 10_000,
        }
    }

    /// Returns the number of requests that may fail in a morph: the request in progress when an established connection
    /// breaks.
    pub(crate) fn failures_allowed(&self) -> u64 {
        match self.backend {
            Backend::Embedded => 0,
            Backend::Qemu | Backend::Multikernel => 1,
        }
    }

    /// Returns the heading of the step with this harm.
    pub(crate) fn heading(&self, harm: Harm) -> &'static str {
        match (self.backend, harm) {
            (Backend::Embedded, Harm::Dies) => "The instance is killed",
            (Backend::Qemu | Backend::Multikernel, Harm::Dies) => "The kernel panics",
            (Backend::Embedded, Harm::Hangs) => {
                "The instance hangs: every process of it is stopped"
            }
            (Backend::Qemu, Harm::Hangs) => "The kernel hangs: the virtual machine is paused",
            (Backend::Multikernel, Harm::Hangs) => {
                "The kernel hangs, and its status says that it runs"
            }
        }
    }

    /// Returns a word for this harm, in the past tense.
    pub(crate) fn word(&self, harm: Harm) -> &'static str {
        match (self.backend, harm) {
            (Backend::Embedded, Harm::Dies) => "killed",
            (Backend::Qemu | Backend::Multikernel, Harm::Dies) => "panicked",
            (_, Harm::Hangs) => "hung",
        }
    }

    /// Harms the instance, and prints how. Signals are sent with system calls, not by a shell, so that the times
    /// measured from here on exclude the start of a shell.
    pub(crate) fn harm(
        &self,
        stage: &Stage,
        harm: Harm,
        instance: &InstanceStatus,
    ) -> Result<(), Trouble> {
        let run_dir = Path::new(&instance.run_dir);
        match (self.backend, harm) {
            (Backend::Embedded, Harm::Dies) => {
                let agent = agent(instance)?;
                stage.command(&format!("kill -KILL {agent}"))?;
                send(agent, Signal::SIGKILL)
            }
            (Backend::Embedded, Harm::Hangs) => {
                let agent = agent(instance)?;
                let children = children(agent);
                let words: Vec<String> = children.iter().map(ToString::to_string).collect();
                stage.command(&format!("kill -STOP {agent} {}", words.join(" ")))?;
                send(agent, Signal::SIGSTOP)?;
                children
                    .into_iter()
                    .try_for_each(|pid| send(pid, Signal::SIGSTOP))
            }
            (Backend::Qemu, Harm::Dies) => {
                stage.say(
                    "QEMU is told `inject-nmi`; a kernel with unknown_nmi_panic=1 panics on that.",
                )?;
                kernels::qmp(run_dir, "inject-nmi");
                Ok(())
            }
            (Backend::Qemu, Harm::Hangs) => {
                stage.say("QEMU is told `stop`: the guest's CPUs execute nothing any more.")?;
                kernels::qmp(run_dir, "stop");
                Ok(())
            }
            (Backend::Multikernel, harm) => {
                let what = match harm {
                    Harm::Dies => "panic",
                    Harm::Hangs => "hang",
                };
                let line = format!("{what} {}", instance.summary.name);
                stage.say(&format!("The emulated kernel is told `{line}`."))?;
                let struck = kmorph_emulated_kernel::ask(&self.emulated, &line);
                let text = |errno| {
                    Trouble::NotAsTold(format!("the emulated kernel refuses {line}: error {errno}"))
                };
                struck.map(drop).map_err(text)
            }
        }
    }
}

/// Returns a hint how to make emulation of a kernel possible.
fn hint() -> String {
    let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("kmorph-demo"));
    let own = quoted(&own);
    format!(
        "as root, where /dev/fuse can be mounted (`modprobe fuse`; in a container, the device and CAP_SYS_ADMIN): \
         sudo {own} --backend=multikernel"
    )
}

/// Returns the target kernels of the morphs in QEMU. Over kerf-vsock, they are the kernels for which the module was
/// built: the module for a newer kernel requires tools that some machines cannot provide.
fn newer_kernels(transport: &str) -> Result<Vec<PathBuf>, Trouble> {
    let mut kernels = vec![fetched("6.12")?];
    let newest = fetched(&kernels::newest())?;
    if transport != "kerf" || kernels::has_module(&newest, "kerf-vsock.ko") {
        kernels.push(newest);
    }
    Ok(kernels)
}

fn fetched(series: &str) -> Result<PathBuf, Trouble> {
    let note = kernels::cache().join("kernels").join(series);
    if note.is_file() {
        return Ok(kernels::debian(series));
    }
    let text =
        format!("there is no Linux {series} ({note:?}): `make demo BACKEND=qemu` fetches it");
    Err(Trouble::NotAsTold(text))
}

fn agent(instance: &InstanceStatus) -> Result<i32, Trouble> {
    let found = instance.processes.get("agent").copied();
    found.ok_or_else(|| Trouble::NotAsTold("the instance has no process".to_owned()))
}

/// Returns the live child processes of `pid`.
fn children(pid: i32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

fn send(pid: i32, signal: Signal) -> Result<(), Trouble> {
    let text =
        |error| Trouble::NotAsTold(format!("process {pid} cannot be sent {signal}: {error}"));
    kill(Pid::from_raw(pid), signal).map_err(text)
}
