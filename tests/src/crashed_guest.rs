//! A guest whose kernel failed: QEMU keeps the guest paused, with its memory in a file.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{kernels, program};

/// Maximum time from QEMU's start to the end of the kernel: a small guest takes 4 seconds on an idle machine.
const END_DEADLINE: Duration = Duration::from_secs(240);
/// Maximum end of the guest's memory below 4 GiB; the rest of its memory is above 4 GiB.
pub const LOW_MEMORY_BYTES: u64 = 2 << 30;
/// Message of the guest when it hangs.
const HANGS: &str = "failing: no CPU goes on from here";
/// Printed by a guest that waits for an NMI from QEMU.
const WAITS: &str = "guest: waits for its end";
/// Last messages of the guest. The second message has two lines and bytes that are not text.
pub const LAST_WORDS: [&str; 2] = ["guest: about to crash", "guest: two"];

/// The way in which a kernel ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By `/proc/sysrq-trigger`.
    Sysrq,
    /// A module reads address 8.
    NullDereference,
    /// Every CPU spins with interrupts off. The guest reports nothing; QEMU is stopped by its monitor.
    Hang,
    /// One of the ways in `tests/kmod/failing.c`.
    Failing(&'static str),
    /// A line of the guest's init script, which is process 1.
    Line(&'static str),
    /// QEMU injects an NMI. The kernel's options make the kernel panic.
    Nmi,
}

/// The kind of the guest, and the way in which its kernel ends.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The series of Debian's kernel; see [`kernels::debian`].
    pub series: &'a str,
    /// The end of the kernel.
    pub end: End,
    /// Memory of the guest, MiB: at least 192, for the kernel, its modules and busybox, with some free memory.
    pub memory_mib: u64,
    /// Number of CPUs of the guest.
    pub cpus: u32,
    /// Size of the files that the guest writes into its memory, MiB.
    pub files_mib: u64,
    /// Whether a program in the guest writes a fake panic and a fake fault to `/dev/kmsg`.
    pub fakes: bool,
    /// A program that becomes `/program` in the guest. It must be linked statically: the guest has no libraries.
    pub program: Option<&'a Path>,
    /// Lines that the guest's shell runs before the kernel ends.
    pub lines: &'a str,
    /// Options at the end of the kernel's command line.
    pub options: &'a str,
    /// QEMU's name of the CPU model.
    pub cpu_model: &'a str,
}

/// A CPU with every feature that QEMU emulates. Debian's kernels use five levels of page tables on this CPU.
pub const FIVE_LEVELS: &str = "max";

impl<'a> Plan<'a> {
    /// Returns a small guest that ends by sysrq.
    #[must_use]
    pub fn small(series: &'a str) -> Self {
        Self {
            series,
            end: End::Sysrq,
            memory_mib: 192,
            cpus: 1,
            files_mib: 4,
            fakes: true,
            program: None,
            lines: "",
            options: "",
            cpu_model: "qemu64",
        }
    }

    fn init(&self) -> String {
        let failing = |how| format!("insmod /failing.ko how={how}");
        let end = match self.end {
            End::Sysrq => "echo c > /proc/sysrq-trigger".to_owned(),
            End::NullDereference => failing("null"),
            End::Hang => failing("hang"),
            End::Failing(how) => failing(how),
            End::Line(line) => line.to_owned(),
            End::Nmi => format!("echo '{WAITS}' > /dev/kmsg; sleep 3600"),
        };
        let parts = self.files_mib.div_ceil(MAX_PART_MIB).max(1);
        let part = self.files_mib.div_ceil(parts).to_string();
        let init = INIT.replace("PART_MIB", &part);
        let init = init.replace("FAKES", if self.fakes { FAKES } else { "" });
        let lines = self.lines;
        format!(
            "{}{lines}\n{end}\n",
            init.replace("PARTS", &parts.to_string())
        )
    }

    /// Returns the kernel's command line.
    #[must_use]
    pub fn command_line(&self) -> String {
        let end = match self.end {
            End::NullDereference | End::Failing(_) => "oops=panic",
            End::Sysrq | End::Hang | End::Line(_) | End::Nmi => "",
        };
        let words = ["console=ttyS0", "panic=-1", end, self.options];
        let given: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
        given.join(" ")
    }
}

/// Maximum size of the generated text; the rest consists of copies. `seq` is slow under emulation.
const MAX_PART_MIB: u64 = 16;
const FAKES: &str = r#"echo "Kernel panic - not syncing: a fake by a program" > /dev/kmsg
echo "<0>BUG: unable to handle a fake" > /dev/kmsg"#;
const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=90% tmpfs /tmp
for module in /modules/*.ko; do insmod $module; done
seq 1000000000 | dd bs=1M count=PART_MIB iflag=fullblock of=/tmp/files-1 2>/dev/null
n=1
while [ $n -lt PARTS ]; do n=$((n + 1)); cp /tmp/files-1 /tmp/files-$n; done
FAKES
echo "guest: about to crash" > /dev/kmsg
printf 'guest: two\nlines \001\377\n' > /dev/kmsg
"#;
/// Modules that report the panic and VMCOREINFO to QEMU, relative to `kernel/drivers/`, in the order of loading.
const MODULES: [&str; 3] = [
    "firmware/qemu_fw_cfg.ko",
    "misc/pvpanic/pvpanic.ko",
    "misc/pvpanic/pvpanic-pci.ko",
];

/// A guest whose kernel failed; see the module.
#[derive(Debug)]
pub struct CrashedGuest {
    dir: TempDir,
    qemu: Child,
    guard: Child,
}

impl CrashedGuest {
    /// Boots the guest, and waits until its kernel has ended.
    pub fn new(plan: &Plan<'_>) -> Self {
        // In memory, like the guests of the backend.
        let place = ["/dev/shm", "/tmp"]
            .into_iter()
            .find(|p| Path::new(p).is_dir());
        let dir = tempfile::Builder::new()
            .prefix("kmorph-crashed-")
            .tempdir_in(place.expect("there is a place for temporary files"))
            .expect("a temporary directory");
        let guard = Command::new(program("kmorph-test-guard"))
            .arg(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("the guard starts");
        let kernel = kernels::debian(plan.series);
        let initramfs = build(dir.path(), &kernel, plan);
        let qemu = start(dir.path(), &kernel, &initramfs, plan);
        let mut guest = Self { dir, qemu, guard };
        guest.wait_for_end(plan.end);
        guest
    }

    /// Returns a path in a directory that is removed together with the guest.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the path of the guest's memory.
    pub fn memory(&self) -> PathBuf {
        self.path("memory")
    }

    /// Makes QEMU dump the guest in one of QEMU's formats; returns the path of the dump.
    pub fn dump(&self, format: &str) -> PathBuf {
        let path = self.path(format);
        let arguments = json!({
            "paging": false,
            "protocol": format!("file:{}", path.display()),
            "format": format,
        });
        let answer = self.qmp("dump-guest-memory", arguments);
        assert!(answer.get("return").is_some(), "{answer}");
        path
    }

    fn wait_for_end(&mut self, end: End) {
        let begun = Instant::now();
        let mut told = false;
        loop {
            let ended = self.qemu.try_wait().expect("it is a child of ours");
            let console = fs::read(self.path("console")).unwrap_or_default();
            let console = String::from_utf8_lossy(&console);
            assert!(ended.is_none(), "QEMU ended: {ended:?}\n{console}");
            assert!(begun.elapsed() < END_DEADLINE, "no end:\n{console}");
            if end == End::Hang && console.contains(HANGS) {
                let answer = self.qmp("stop", json!({}));
                assert!(answer.get("return").is_some(), "{answer}");
                return;
            }
            if end == End::Nmi && !told && console.contains(WAITS) {
                let answer = self.qmp("inject-nmi", json!({}));
                assert!(answer.get("return").is_some(), "{answer}");
                told = true;
            }
            if self.path("qmp").exists()
                && self.qmp("query-status", json!({}))["return"]["status"] == "guest-panicked"
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn qmp(&self, command: &str, arguments: Value) -> Value {
        let Ok(mut qmp) = UnixStream::connect(self.path("qmp")) else {
            return Value::Null;
        };
        let own = qmp.try_clone().expect("a descriptor is left");
        let mut said = BufReader::new(own).lines().map_while(Result::ok);
        let mut answer = Value::Null;
        for (command, arguments) in [("qmp_capabilities", json!({})), (command, arguments)] {
            let request = json!({ "execute": command, "arguments": arguments });
            writeln!(qmp, "{request}").expect("QEMU takes commands");
            answer = said
                .by_ref()
                .map(|line| serde_json::from_str::<Value>(&line).expect("QEMU speaks JSON"))
                .find(|line| line.get("return").is_some() || line.get("error").is_some())
                .unwrap_or_default();
        }
        answer
    }
}

impl Drop for CrashedGuest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        // The guard sees its pipe close and removes the rest.
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

fn start(dir: &Path, kernel: &Path, initramfs: &Path, plan: &Plan<'_>) -> Child {
    let memory = dir.join("memory");
    let ram = format!(
        "memory-backend-file,id=ram,size={}M,share=on,mem-path={}",
        plan.memory_mib,
        memory.display()
    );
    let console = format!("file,id=console,path={}", dir.join("console").display());
    let qmp = format!("unix:{},server=on,wait=off", dir.join("qmp").display());
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-accel", "tcg,tb-size=128"])
        .args(["-machine", "q35,memory-backend=ram,max-ram-below-4g=2G"])
        .args(["-m", &format!("{}M", plan.memory_mib), "-object", &ram])
        .args(["-smp", &plan.cpus.to_string()])
        .args(["-action", "reboot=shutdown,shutdown=poweroff,panic=pause"])
        .args(["-device", "pvpanic-pci", "-device", "vmcoreinfo"])
        .args(["-chardev", &console, "-serial", "chardev:console"])
        .args(["-cpu", plan.cpu_model])
        .args(["-qmp", &qmp, "-append", &plan.command_line()])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs);
    qemu.stdin(Stdio::null()).spawn().expect("QEMU starts")
}

/// Builds the guest's initramfs from busybox, modules, and an init that ends the kernel.
fn build(dir: &Path, kernel: &Path, plan: &Plan<'_>) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(name)).expect("a directory can be made");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox is installed");
    for applet in [
        "sh", "mount", "insmod", "dd", "seq", "cp", "printf", "sleep",
    ] {
        symlink("busybox", root.join("bin").join(applet)).expect("a link can be made");
    }
    let home = kernel.parent().expect("an image lies in a directory");
    let release = home.file_name().expect("it is named after its release");
    let drivers = home
        .join("lib/modules")
        .join(release)
        .join("kernel/drivers");
    for (order, module) in MODULES.iter().enumerate() {
        let to = root.join(format!("modules/{order}.ko"));
        unpack(&drivers.join(module), &to);
    }
    if plan.end != End::Sysrq {
        let failing = kernels::built_modules(kernel).join("failing.ko");
        fs::copy(failing, root.join("failing.ko")).expect("scripts/build-kmod has built it");
    }
    if let Some(program) = plan.program {
        fs::copy(program, root.join("program")).expect("the program is there");
    }
    fs::write(root.join("init"), plan.init()).expect("a file can be written");
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("init"), executable).expect("it is ours");
    let image = dir.join("initramfs");
    let packed = Command::new("sh")
        .args(["-c", "find . | cpio --create --format=newc --quiet"])
        .current_dir(&root)
        .stdout(fs::File::create(&image).expect("a file can be made"))
        .status();
    assert!(packed.expect("cpio runs").success());
    image
}

/// Copies a module, and decompresses it if it is packed with xz.
pub(crate) fn unpack(module: &Path, to: &Path) {
    if module.exists() {
        fs::copy(module, to).expect("a module can be copied");
        return;
    }
    let unpacked = Command::new("xz")
        .arg("-dc")
        .arg(module.with_extension("ko.xz"))
        .stdout(fs::File::create(to).expect("a file can be made"))
        .status();
    assert!(unpacked.expect("xz runs").success(), "{module:?}");
}
