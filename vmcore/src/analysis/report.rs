//! The results of an analysis, as structures for programs: the field names are part of the command line's contract.
//! Sizes are in bytes, counts in pages, and the names of durations include their unit.

use serde::Serialize;

use super::events::Event;
use crate::kernel::pages::PageCounts;

/// The complete report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The file.
    pub file: FileReport,
    /// The kernel; `None` when nothing in the dump describes it.
    pub kernel: Option<KernelReport>,
    /// How it ended.
    pub crash: CrashReport,
    /// The CPUs whose registers the dump has.
    pub cpus: Vec<CpuReport>,
    /// The modules that were loaded.
    pub modules: Option<ModulesReport>,
    /// The memory.
    pub memory: MemoryReport,
    /// The log; `None` when it cannot be read.
    pub log: Option<LogReport>,
    /// Information that could not be determined, with the reasons.
    pub problems: Vec<String>,
}

/// The file.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    /// Its format.
    pub format: &'static str,
    /// Its length; of a flattened file, the length of the file it describes.
    pub bytes: u64,
    /// False when something says that a part is missing.
    pub complete: bool,
    /// The reason.
    pub incomplete_because: Option<&'static str>,
    /// `holds`, `broken`, `wrong_length`, or `none` when there is none.
    pub checksum: &'static str,
    /// How pages are packed.
    pub packings: Vec<&'static str>,
    /// The dump level, as makedumpfile's `-d`; `None` if the file does not record it.
    pub level: Option<u32>,
    /// True when kmorph wrote it.
    pub written_by_kmorph: bool,
}

/// The kernel.
#[derive(Clone, Debug, Serialize)]
pub struct KernelReport {
    /// Its release.
    pub release: Option<String>,
    /// The whole line with which it introduces itself.
    pub version: Option<String>,
    /// The machine that it ran on, as the firmware names it.
    pub machine: Option<String>,
    /// The build id, hexadecimal.
    pub build_id: Option<String>,
    /// Its command line.
    pub command_line: Option<String>,
    /// The place where VMCOREINFO was found.
    pub vmcoreinfo: String,
    /// Bytes by which its addresses are moved, hexadecimal.
    pub kaslr_offset: Option<String>,
    /// The taint flags.
    pub taint: Option<TaintReport>,
}

/// The taint flags of a kernel.
#[derive(Clone, Debug, Serialize)]
pub struct TaintReport {
    /// The letters that the kernel uses; empty when it is not tainted.
    pub letters: String,
    /// The meaning of each flag.
    pub meanings: Vec<&'static str>,
    /// The source of this information.
    pub source: &'static str,
}

/// How it ended.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CrashReport {
    /// The panic message.
    pub panic: Option<String>,
    /// The cause: the last fault before the panic, if the panic message says that it follows one.
    pub cause: Option<String>,
    /// Time from boot to the last message of the log: the kernel lived at least so long.
    pub uptime_at_least_ns: Option<u64>,
    /// Time of the crash, in seconds since 1970; recorded by a kdump kernel.
    pub time_unix_s: Option<u64>,
    /// Faults, warnings and panics in the log, oldest first.
    pub events: Vec<Event>,
}

/// One CPU.
#[derive(Clone, Debug, Serialize)]
pub struct CpuReport {
    /// Its place in the dump's notes.
    pub index: usize,
    /// `kernel` or `user`.
    pub mode: &'static str,
    /// The symbol it was at.
    pub at: Option<String>,
    /// True when that is where an idle CPU waits.
    pub idle: bool,
    /// Names and values, hexadecimal.
    pub registers: Vec<(&'static str, String)>,
    /// Addresses on its stack that lie in the kernel's code. A guess: not each of them was called.
    pub stack: Vec<String>,
}

/// The modules.
#[derive(Clone, Debug, Serialize)]
pub struct ModulesReport {
    /// Their names.
    pub names: Vec<String>,
    /// The source of this information.
    pub source: &'static str,
}

/// The memory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemoryReport {
    /// Bytes that the machine has.
    pub bytes: u64,
    /// Pages that the machine has.
    pub pages: u64,
    /// Pages that are in the file, where it keeps count.
    pub pages_in_file: Option<u64>,
    /// The page types.
    pub kinds: Option<PageCounts>,
    /// Pages of zeros.
    pub zero: Option<u64>,
    /// Pages that were left out, by kind.
    pub left_out: Option<PageCounts>,
    /// Pages that should be in the file and cannot be read.
    pub unreadable: Option<u64>,
}

/// The log.
#[derive(Clone, Debug, Serialize)]
pub struct LogReport {
    /// Messages.
    pub messages: usize,
    /// Messages that could not be read, or were too many.
    pub messages_lost: u64,
    /// As `makedumpfile --dump-dmesg` writes it.
    pub text: String,
}
