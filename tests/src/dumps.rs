//! Writes vmcores of guests that failed, and has crash read them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kmorph_vmcore::kernel::{Kernel, Origin};
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output, Written};
use kmorph_vmcore::{Dump, MemoryFile};

use crate::crashed_guest::{CrashedGuest, LOW_MEMORY_BYTES, Plan};
use crate::kernels;

/// Writes a vmcore of the guest's memory.
pub fn written(guest: &CrashedGuest, name: &str, output: Output, level: u32) -> (PathBuf, Written) {
    let path = guest.path(name);
    let file = File::open(guest.memory()).unwrap();
    let memory = MemoryFile::of_pc(file, LOW_MEMORY_BYTES).unwrap();
    let kernel = Kernel::in_memory(&memory).unwrap();
    assert!(matches!(kernel.info().origin(), Origin::Memory { .. }));
    let registers = Dump::open(&guest.path("elf")).unwrap().unwrap();
    let cpus: Vec<_> = registers
        .notes()
        .cpus
        .iter()
        .map(|cpu| cpu.status)
        .collect();
    let contents = Contents {
        memory: &memory,
        kernel: Some(&kernel),
        cpus: &cpus,
        level_of_source: 0,
    };
    let options = Options {
        output,
        level,
        threads: 2,
        time: Duration::from_secs(1_800_000_000),
    };
    let written = writer::write(contents, options, &Control::default(), &path).unwrap();
    assert_eq!(written.note.unreadable.get(), 0);
    (path, written)
}

/// The `vmlinux` of this series with Debian's debug symbols, which `scripts/fetch-debug-symbols` fetches.
pub fn vmlinux(series: &str) -> PathBuf {
    let kernel = kernels::debian(series);
    let release = kernel
        .parent()
        .and_then(Path::file_name)
        .expect("a directory is named after its release");
    let symbols = kernels::cache().join("debug-symbols");
    symbols.join(release).join("vmlinux")
}

/// Runs these commands in crash on a vmcore of the guest, without options, and returns the output.
///
/// # Errors
/// The output of a crash that failed.
pub fn crash(
    guest: &CrashedGuest,
    plan: &Plan<'_>,
    path: &Path,
    commands: &[&str],
) -> Result<String, String> {
    let script = guest.path("commands");
    std::fs::write(&script, commands.join("\n") + "\nquit\n").expect("a file can be written");
    let ran = Command::new("crash")
        .arg("-s")
        .arg("-i")
        .arg(&script)
        .arg(vmlinux(plan.series))
        .arg(path)
        .output();
    let ran = ran.expect("make test-crash installs crash");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    if ran.status.success() {
        return Ok(said);
    }
    let errors = String::from_utf8_lossy(&ran.stderr);
    Err(format!("crash {path:?}: {}\n{said}\n{errors}", ran.status))
}
