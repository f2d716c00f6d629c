//! Determines the capabilities of this machine by trial.
//!
//! `/dev/kvm` can exist, open and create a machine, and still be unable to run a kernel. So KVM is used only after it
//! has passed two tests:
//!
//! ```text
//! untested ─ a ROM of six instructions ends QEMU with its code ─▶ plausible ─ a kernel boots ─▶ works
//!    └────────────────────────── anything else, or nothing in time ──────────────────────────▶ unusable
//! ```
//!
//! The ROM runs when the daemon starts, the boot test with the first kernel that is spawned. The result is kept until
//! the host reboots or QEMU changes.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kmorph_files::OwnDir;
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::Mutex;

use super::command::{self, Accelerator};
use crate::contract::{PANIC_LINE, SpawnError};

/// Mode of the cache directory if it must be created: its contents are not secret.
const CACHE_DIR_MODE: u32 = 0o755;
/// Maximum time for the ROM, which takes a tenth of a second.
const ROM_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum time for a kernel to boot under KVM, which takes about one second.
const BOOT_TIMEOUT: Duration = Duration::from_secs(8);
/// Version line of the newest release of vhost-device-vsock; `scripts/vhost-device-vsock.patch` fixes its bug.
const UNSOUND_DEVICE: &str = "vhost-device-vsock 0.3.0";
/// Maximum time for a program to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);
/// The beginning of the last 16 bytes of the ROM, where a processor starts: mov dx,0x501; mov al,0x31; out dx,al; hlt.
const ROM_CODE: [u8; 7] = [0xba, 0x01, 0x05, 0xb0, 0x31, 0xee, 0xf4];
const ROM_BYTES: usize = 64 * 1024;
/// isa-debug-exit ends QEMU with (value << 1) | 1.
const ROM_STATUS: i32 = (0x31 << 1) | 1;
/// QEMU's first major version with sound emulation: older ones sometimes corrupt the memory of guests from Linux 6.12
/// on.
const SOUND_EMULATION: u32 = 8;
const SOUND_EMULATION_NEEDED_FROM: (u32, u32) = (6, 12);

/// QEMU's version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) major: u32,
    pub(super) text: String,
}

impl Version {
    /// Queries the program.
    pub(super) async fn of(qemu: &Path) -> Result<Self, SpawnError> {
        let text = first_line(qemu).await.map_err(|reason| {
            SpawnError::Unavailable(format!(
                "QEMU ({qemu:?}) cannot be used: {reason}; run scripts/setup, or name it with \
                 qemu.program"
            ))
        })?;
        Self::parse(&text).ok_or_else(|| {
            SpawnError::Unavailable(format!(
                "{qemu:?} --version says {text:?}, which is not QEMU; name it with qemu.program"
            ))
        })
    }

    fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("QEMU emulator version ")?;
        let text = rest.split_whitespace().next()?.to_owned();
        let major = text.split('.').next()?.parse().ok()?;
        Some(Self { major, text })
    }

    /// Refuses a kernel that this QEMU cannot emulate soundly.
    pub(super) fn check(&self, accelerator: Accelerator, release: &str) -> Result<(), SpawnError> {
        let mut numbers = release
            .split(['.', '-'])
            .map(|part| part.parse().unwrap_or(0));
        let kernel = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let risky = accelerator == Accelerator::Tcg
            && self.major < SOUND_EMULATION
            && kernel >= SOUND_EMULATION_NEEDED_FROM;
        if risky {
            return Err(SpawnError::Refused(format!(
                "QEMU {} corrupts Linux {release} in software emulation; install QEMU \
                 {SOUND_EMULATION} or newer (scripts/setup takes it from bookworm-backports)",
                self.text
            )));
        }
        Ok(())
    }
}

/// Returns the first line of the output of `program --version`, or why there is none.
pub(super) async fn first_line(program: &Path) -> Result<String, String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(VERSION_TIMEOUT, output)
        .await
        .map_err(|_| format!("--version did not exit within {VERSION_TIMEOUT:?}"))?
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("--version ended with {}", output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .next()
        .unwrap_or("")
        .chars()
        .take(200)
        .collect())
}

/// Returns the verdict on a vhost-device-vsock with this version line.
pub(super) fn judge_vsock_device(line: &str) -> String {
    if line.trim() != UNSOUND_DEVICE {
        return line.to_owned();
    }
    format!(
        "{line}, which can permanently stop serving a guest when a connection is abandoned; \
         scripts/fetch-vhost-vsock builds a version without this bug"
    )
}

/// Whether KVM can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kvm {
    Untested,
    /// The ROM ran.
    Plausible,
    /// A kernel booted, or the configuration insists.
    Works,
    /// KVM cannot be used, with the reason.
    Unusable(String),
}

/// The result stored in the cache directory.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    host_boot_id: String,
    qemu: String,
    kvm_works: bool,
    detail: String,
}

/// Determines the result once, and stores it.
pub(super) struct KvmProbe {
    qemu: PathBuf,
    host_boot_id: String,
    cache: PathBuf,
    state: Mutex<Kvm>,
}

impl KvmProbe {
    pub(super) fn new(qemu: &Path, host_boot_id: &str, cache: &Path) -> Self {
        Self {
            qemu: qemu.to_owned(),
            host_boot_id: host_boot_id.to_owned(),
            cache: cache.to_owned(),
            state: Mutex::new(Kvm::Untested),
        }
    }

    fn memory(&self) -> PathBuf {
        self.cache.join("kvm-probe.json")
    }

    fn recall(&self, version: &Version) -> Option<Kvm> {
        let text = std::fs::read(self.memory()).ok()?;
        let known: Remembered = serde_json::from_slice(&text).ok()?;
        let same = known.host_boot_id == self.host_boot_id && known.qemu == version.text;
        same.then_some(match known.kvm_works {
            true => Kvm::Works,
            false => Kvm::Unusable(known.detail),
        })
    }

    /// Stores the result. A failed write only costs another probe at the next start.
    fn remember(&self, version: &Version, kvm: &Kvm) {
        let (kvm_works, detail) = match kvm {
            Kvm::Works => (true, String::new()),
            Kvm::Unusable(reason) => (false, reason.clone()),
            Kvm::Untested | Kvm::Plausible => return,
        };
        let known = Remembered {
            host_boot_id: self.host_boot_id.clone(),
            qemu: version.text.clone(),
            kvm_works,
            detail,
        };
        if let Ok(text) = serde_json::to_vec(&known) {
            let _ = self.write(&self.memory(), &text);
        }
    }

    /// Writes a file in the cache directory.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
        OwnDir::make(&self.cache, CACHE_DIR_MODE)?.write(name, bytes)?;
        Ok(())
    }

    /// Runs the first test. Returns the result as text for the operator.
    pub(super) async fn first(&self, version: &Version) -> String {
        let mut state = self.state.lock().await;
        if *state == Kvm::Untested {
            *state = match self.recall(version) {
                Some(known) => known,
                None => self.rom().await,
            };
            self.remember(version, &state);
        }
        match &*state {
            Kvm::Works => "kvm".to_owned(),
            Kvm::Untested | Kvm::Plausible => {
                "kvm, to be confirmed by the first kernel that boots".to_owned()
            }
            Kvm::Unusable(reason) => format!("software emulation, because {reason}"),
        }
    }

    /// Returns the accelerator for `kernel`. The first call boots the kernel.
    pub(super) async fn accelerator(&self, version: &Version, kernel: &Path) -> Accelerator {
        self.first(version).await;
        let mut state = self.state.lock().await;
        if *state == Kvm::Plausible {
            *state = self.boot(kernel).await;
            self.remember(version, &state);
        }
        match *state {
            Kvm::Works => Accelerator::Kvm,
            _ => Accelerator::Tcg,
        }
    }

    /// Tries KVM without a kernel as far as possible, or with this one, if the configuration permits nothing else.
    ///
    /// # Errors
    /// If KVM cannot be used here.
    pub(super) async fn required(
        &self,
        version: &Version,
        kernel: Option<&Path>,
    ) -> Result<Accelerator, SpawnError> {
        match kernel {
            Some(kernel) => drop(self.accelerator(version, kernel).await),
            None => drop(self.first(version).await),
        }
        match &*self.state.lock().await {
            Kvm::Unusable(reason) => Err(SpawnError::Unavailable(format!(
                "qemu.accel is \"kvm\", but KVM cannot be used here: {reason}; set qemu.accel to \"auto\" or \
                 \"tcg\" for software emulation"
            ))),
            Kvm::Untested | Kvm::Plausible | Kvm::Works => Ok(Accelerator::Kvm),
        }
    }

    async fn rom(&self) -> Kvm {
        if let Err(error) = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
        {
            return Kvm::Unusable(format!("/dev/kvm cannot be opened ({error})"));
        }
        let mut rom = vec![0xf4; ROM_BYTES];
        rom[ROM_BYTES - 16..][..ROM_CODE.len()].copy_from_slice(&ROM_CODE);
        let path = self
            .cache
            .join(format!("kvm-probe.{}.rom", std::process::id()));
        let written = self.write(&path, &rom);
        if let Err(error) = written {
            return Kvm::Unusable(format!(
                "cannot write the test program to {path:?}: {error}"
            ));
        }
        let device = "isa-debug-exit,iobase=0x501,iosize=1";
        let mut arguments = vec!["-m".into(), "16M".into(), "-device".into(), device.into()];
        arguments.extend([OsString::from("-bios"), path.clone().into()]);
        let result = self.try_out(arguments, ROM_TIMEOUT).await;
        let _ = std::fs::remove_file(&path);
        match result {
            Ok((Some(ROM_STATUS), _)) => Kvm::Plausible,
            Ok((status, output)) => Kvm::Unusable(explain("run a test", status, &output)),
            Err(reason) => Kvm::Unusable(format!("KVM did not run a test: {reason}")),
        }
    }

    /// Boots the kernel without a root file system: it runs up to a panic, which resets the machine.
    async fn boot(&self, kernel: &Path) -> Kvm {
        let mut arguments: Vec<OsString> = ["-m", "256M", "-serial", "stdio", "-no-reboot"]
            .map(OsString::from)
            .to_vec();
        let cmdline = "console=ttyS0 panic=-1";
        arguments.extend(["-append".into(), cmdline.into()]);
        arguments.extend([OsString::from("-kernel"), kernel.into()]);
        match self.try_out(arguments, BOOT_TIMEOUT).await {
            Ok((Some(0), output)) if output.contains(PANIC_LINE) => Kvm::Works,
            Ok((status, output)) => Kvm::Unusable(explain("boot a kernel", status, &output)),
            Err(reason) => Kvm::Unusable(format!("KVM did not boot a kernel: {reason}")),
        }
    }

    /// Runs QEMU with KVM until it ends. Returns its status and the end of its output.
    async fn try_out(
        &self,
        arguments: Vec<OsString>,
        timeout: Duration,
    ) -> Result<(Option<i32>, String), String> {
        let output = Command::new(&self.qemu)
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "q35"])
            .args(command::accelerator(Accelerator::Kvm))
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        match tokio::time::timeout(timeout, output).await {
            Ok(Ok(output)) => {
                let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.push_str(&String::from_utf8_lossy(&output.stderr));
                Ok((output.status.code(), text))
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no result within {timeout:?}")),
        }
    }
}

fn explain(what: &str, status: Option<i32>, output: &str) -> String {
    let status = status.map_or("a signal".to_owned(), |s| format!("status {s}"));
    let said = output.lines().rev().find(|line| line.contains("rror"));
    let said: String = said.unwrap_or("nothing").chars().take(160).collect();
    format!("KVM could not {what}: QEMU ended with {status} and said {said:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_device_with_the_known_fault_is_named_as_such() {
        let told = judge_vsock_device("vhost-device-vsock 0.3.0\n");
        assert!(told.contains("scripts/fetch-vhost-vsock"), "{told}");
        let sound = "vhost-device-vsock 0.3.0-kmorph.1";
        assert_eq!(judge_vsock_device(sound), sound);
    }

    fn version(text: &str) -> Version {
        Version::parse(&format!("QEMU emulator version {text} (Debian)")).unwrap()
    }

    #[test]
    fn an_emulator_that_corrupts_a_kernel_is_refused_for_that_kernel_only() {
        let old = version("7.2.15");
        assert!(old.check(Accelerator::Tcg, "6.1.0-50-cloud-amd64").is_ok());
        assert!(
            old.check(Accelerator::Kvm, "6.12.95+deb12-cloud-amd64")
                .is_ok()
        );
        let error = old.check(Accelerator::Tcg, "6.12.95+deb12-cloud-amd64");
        assert!(error.unwrap_err().to_string().contains("install QEMU 8"));
        assert!(old.check(Accelerator::Tcg, "7.0-rc1").is_err());
        let new = version("10.0.2");
        assert!(
            new.check(Accelerator::Tcg, "6.12.95+deb12-cloud-amd64")
                .is_ok()
        );
        assert_eq!(Version::parse("bash 5"), None);
    }

    /// Returns a program in place of QEMU that runs `script`.
    fn pretend(dir: &Path, script: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("qemu");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_kvm_that_runs_code_but_boots_no_kernel_is_not_used_and_that_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let runs_rom =
            "case \"$*\" in *-bios*) exit 99;; esac; echo 'error: failed to set MSR'; exit 134";
        let qemu = pretend(dir.path(), runs_rom);
        let probe = || KvmProbe::new(&qemu, "boot-1", dir.path());
        let version = version("10.0.2");
        let first = probe();
        *first.state.lock().await = first.boot(Path::new("/k")).await;
        let state = first.state.lock().await.clone();
        assert!(matches!(&state, Kvm::Unusable(why) if why.contains("failed to set MSR")));
        first.remember(&version, &state);
        assert_eq!(probe().recall(&version), Some(state));
        let rebooted = KvmProbe::new(&qemu, "boot-2", dir.path());
        assert_eq!(rebooted.recall(&version), None);
    }

    #[tokio::test]
    async fn a_boot_that_reaches_its_panic_proves_kvm() {
        let dir = tempfile::tempdir().unwrap();
        let qemu = pretend(dir.path(), "echo 'Kernel panic - not syncing: VFS'; exit 0");
        let probe = KvmProbe::new(&qemu, "boot-1", dir.path());
        assert_eq!(probe.boot(Path::new("/k")).await, Kvm::Works);
    }

    #[tokio::test]
    async fn a_kvm_that_is_asked_for_and_does_not_work_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let qemu = pretend(dir.path(), "echo 'error: failed to set MSR'; exit 134");
        let version = version("10.0.2");
        for kernel in [None, Some(Path::new("/k"))] {
            let probe = KvmProbe::new(&qemu, "boot-1", dir.path());
            *probe.state.lock().await = Kvm::Plausible;
            let required = probe.required(&version, kernel).await;
            match (kernel, required) {
                // A test with a kernel is still required.
                (None, required) => assert!(matches!(required, Ok(Accelerator::Kvm))),
                (Some(_), required) => {
                    let text = required.unwrap_err().to_string();
                    assert!(text.contains("failed to set MSR"), "{text}");
                    assert!(text.contains("\"auto\""), "{text}");
                }
            }
        }
    }
}
