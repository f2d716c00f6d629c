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
    /// The kernel; `None` if nothing in the dump describes it.
    pub kernel: Option<KernelReport>,
    /// The end of the kernel.
    pub crash: CrashReport,
    /// The CPUs whose registers are in the dump.
    pub cpus: Vec<CpuReport>,
    /// The loaded modules.
    pub modules: Option<ModulesReport>,
    /// The memory.
    pub memory: MemoryReport,
    /// The log; `None` if it cannot be read.
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
    /// False if a part is known to be missing.
    pub complete: bool,
    /// The reason.
    pub incomplete_because: Option<&'static str>,
    /// `holds`, `broken`, `wrong_length`, or `none` if the file has no checksum.
    pub checksum: &'static str,
    /// The compression methods of the pages.
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
    /// The full line of its banner.
    pub version: Option<String>,
    /// The machine's name from the firmware.
    pub machine: Option<String>,
    /// The build id, hexadecimal.
    pub build_id: Option<String>,
    /// Its command line.
    pub command_line: Option<String>,
    /// The place where VMCOREINFO was found.
    pub vmcoreinfo: String,
    /// Offset of its addresses by KASLR, in bytes, hexadecimal.
    pub kaslr_offset: Option<String>,
    /// The taint flags.
    pub taint: Option<TaintReport>,
}

/// The taint flags of a kernel.
#[derive(Clone, Debug, Serialize)]
pub struct TaintReport {
    /// The kernel's letters; empty if it is not tainted.
    pub letters: String,
    /// The meaning of each flag.
    pub meanings: Vec<&'static str>,
    /// The source of this information.
    pub source: &'static str,
}

/// The end of the kernel.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CrashReport {
    /// The panic message.
    pub panic: Option<String>,
    /// The cause: the last fault before the panic, if the panic message says that it follows one.
    pub cause: Option<String>,
    /// Time from boot to the last message of the log: the kernel lived at least this long.
    pub uptime_at_least_ns: Option<u64>,
    /// Time of the crash, in seconds since 1970; recorded by a kdump kernel.
    pub time_unix_s: Option<u64>,
    /// Faults, warnings and panics in the log, oldest first.
    pub events: Vec<Event>,
}

/// One CPU.
#[derive(Clone, Debug, Serialize)]
pub struct CpuReport {
    /// Its index in the dump's notes.
    pub index: usize,
    /// `kernel` or `user`.
    pub mode: &'static str,
    /// The symbol at its instruction pointer.
    pub at: Option<String>,
    /// True if that is a place where an idle CPU waits.
    pub idle: bool,
    /// Names and values, hexadecimal.
    pub registers: Vec<(&'static str, String)>,
    /// Addresses on its stack that are in the kernel's code. A guess: not all of them were called.
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
    /// Size of the machine's memory, bytes.
    pub bytes: u64,
    /// Number of the machine's pages.
    pub pages: u64,
    /// Number of pages in the file, if the file records it.
    pub pages_in_file: Option<u64>,
    /// The page types.
    pub kinds: Option<PageCounts>,
    /// Number of zero pages.
    pub zero: Option<u64>,
    /// Number of omitted pages, by type.
    pub left_out: Option<PageCounts>,
    /// Number of pages that should be in the file and cannot be read.
    pub unreadable: Option<u64>,
}

/// The log.
#[derive(Clone, Debug, Serialize)]
pub struct LogReport {
    /// Number of messages.
    pub messages: usize,
    /// Number of messages that could not be read, or were too many.
    pub messages_lost: u64,
    /// The text, in the format of `makedumpfile --dump-dmesg`.
    pub text: String,
}
