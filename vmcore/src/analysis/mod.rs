//! Analyses a dump without debug symbols, from VMCOREINFO, the log, and the kernel's own symbol table.
//! [`Report::problems`] lists what could not be determined.

mod build_id;
mod cpus;
pub mod events;
mod report;
mod shortfalls;
mod taint;
pub mod tasks;
mod titles;

pub use shortfalls::shortfalls;

pub use report::{
    CpuReport, CrashReport, FileReport, KernelReport, LogReport, MemoryReport, ModulesReport,
    Report, TaintReport,
};

use crate::dump::{ChecksumState, Completeness, Dump};
use crate::error::DumpError;
use crate::kernel::log::Log;
use crate::kernel::pages::{PageCounts, PageKind, Pages};
use crate::kernel::symbols::Symbols;
use crate::kernel::{Kernel, Origin, VmcoreInfo};
use crate::memory::{PAGE, PAGE_BYTES, PhysRange, PhysicalMemory};
use events::Event;

/// Maximum length of a text from the kernel's memory, bytes.
const TEXT_MAX_BYTES: usize = 4096;
/// Number of pages per read in a scan.
const SCAN_PAGES: usize = 256;

/// Optional parts of an analysis.
#[derive(Clone, Copy, Debug, Default)]
pub struct AnalysisOptions {
    /// Read every page: counts zero pages, and finds damaged ones. Takes as long as reading the file.
    pub scan: bool,
}

/// Analyses a dump.
///
/// # Errors
///
/// If the file cannot be read. A dump with little information is not an error.
pub fn analyse(dump: &Dump, options: AnalysisOptions) -> Result<Report, DumpError> {
    let mut problems = Vec::new();
    let file = file(dump)?;
    let kernel = noted(Kernel::in_dump(dump), "the kernel", &mut problems);
    let kernel = kernel.as_ref();
    let log = kernel.and_then(|kernel| noted(kernel.log(), "the log", &mut problems));
    let symbols =
        kernel.and_then(|kernel| noted(kernel.symbols(), "the kernel's symbols", &mut problems));
    let found = Found::of(symbols.as_ref());
    let events = log.as_ref().map(events::events).unwrap_or_default();
    let code = found.stext.zip(found.etext);
    let cpus = dump.notes().cpus.iter().enumerate();
    let cpus = cpus.map(|(index, cpu)| cpus::report(index, cpu, kernel, symbols.as_ref(), code));
    let mut report = Report {
        cpus: cpus.collect(),
        modules: modules(kernel, &found, &events),
        memory: memory(dump, kernel, options, &mut problems),
        kernel: kernel.map(|kernel| describe(dump, kernel, &found, log.as_ref(), &events)),
        crash: crash(kernel, log.as_ref(), events),
        log: log.as_ref().map(LogReport::of),
        file,
        problems: Vec::new(),
    };
    if report.kernel.is_none()
        && let Some(release) = release_alone(dump)
    {
        problems.push(format!("only the kernel's release is known: {release}"));
    }
    if report.cpus.is_empty() {
        problems.push("the registers of the CPUs: the dump has no notes of them".to_owned());
    }
    report.problems = problems;
    // A page that cannot be unpacked counts as missing like an absent one; only `scan` reads all pages.
    if options.scan && report.memory.unreadable.is_some_and(|pages| pages > 0) {
        report.file.complete = false;
        let because = "pages that are in it cannot be read";
        report.file.incomplete_because.get_or_insert(because);
    }
    Ok(report)
}

/// Returns the kernel's release, if nothing else is known about the kernel.
fn release_alone(dump: &Dump) -> Option<String> {
    let text = dump.notes().vmcoreinfo.as_deref();
    let info = text.map(|text| VmcoreInfo::parse(text, Origin::Note));
    let named = info.and_then(|info| info.release().map(str::to_owned));
    named.or_else(|| dump.header_release())
}

/// Returns the value; adds an error to the problems.
fn noted<T, E: std::fmt::Display>(
    result: Result<T, E>,
    what: &str,
    problems: &mut Vec<String>,
) -> Option<T> {
    result
        .map_err(|error| problems.push(format!("{what}: {error}")))
        .ok()
}

/// Addresses of the required symbols.
struct Found {
    tainted_mask: Option<u64>,
    command_line: Option<u64>,
    banner: Option<u64>,
    modules: Option<u64>,
    stext: Option<u64>,
    etext: Option<u64>,
}

impl Found {
    fn of(symbols: Option<&Symbols>) -> Self {
        let names = [
            "tainted_mask",
            "saved_command_line",
            "linux_banner",
            "modules",
            "_stext",
            "_etext",
        ];
        let found = symbols.map_or([None; 6], |symbols| symbols.find(names));
        let [tainted_mask, command_line, banner, modules, stext, etext] = found;
        Self {
            tainted_mask,
            command_line,
            banner,
            modules,
            stext,
            etext,
        }
    }
}

impl FileReport {
    /// Describes only the file, not the memory in it. Reads every descriptor, and all of the file if it has a
    /// checksum.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn of(dump: &Dump) -> Result<Self, DumpError> {
        file(dump)
    }
}

fn file(dump: &Dump) -> Result<FileReport, DumpError> {
    let incomplete_because = match dump.completeness() {
        Completeness::Complete => None,
        Completeness::Incomplete(why) => Some(why),
    };
    // An incomplete file may lack descriptors.
    let packings = match (dump.packings(), incomplete_because) {
        (Ok(packings), _) => packings,
        (Err(_), Some(_)) => Vec::new(),
        (Err(error), None) => return Err(error),
    };
    Ok(FileReport {
        format: dump.format().name(),
        bytes: dump.file_bytes(),
        complete: incomplete_because.is_none(),
        incomplete_because,
        checksum: match dump.check_checksum()? {
            ChecksumState::None => "none",
            ChecksumState::Holds => "holds",
            ChecksumState::Broken { .. } => "broken",
            ChecksumState::WrongLength { .. } => "wrong_length",
        },
        packings: packings.into_iter().map(|packing| packing.name()).collect(),
        level: dump.level(),
        written_by_kmorph: dump.own().is_some(),
    })
}

fn describe(
    dump: &Dump,
    kernel: &Kernel<'_>,
    found: &Found,
    log: Option<&Log>,
    events: &[Event],
) -> KernelReport {
    let info = kernel.info();
    let text = |address: u64| {
        let text = kernel.text_at(address, TEXT_MAX_BYTES);
        let text = String::from_utf8_lossy(&text).trim_end().to_owned();
        (!text.is_empty()).then_some(text)
    };
    let pointed = |address: u64| text(kernel.u64_at(address, "a text").ok()?);
    let said = |prefix: &str| log.and_then(|log| line_behind(log, prefix));
    let mask = found.tainted_mask;
    let taint = mask.and_then(|address| taint::of_mask(kernel, address).ok());
    let whos = || events.iter().rev().filter_map(|event| event.who.as_deref());
    let hardware = events.iter().rev().find_map(|event| event.hardware.clone());
    KernelReport {
        release: info.release().map(str::to_owned),
        version: found
            .banner
            .and_then(text)
            .or_else(|| said("Linux version ")),
        machine: hardware.or_else(|| machine(log?)),
        build_id: info.build_id().map(str::to_owned),
        command_line: found
            .command_line
            .and_then(pointed)
            .or_else(|| said("Command line: ")),
        vmcoreinfo: match info.origin() {
            Origin::Note => "a note of the dump".to_owned(),
            Origin::Memory { phys } => {
                let noted = dump.notes().vmcoreinfo.is_some();
                let why = if noted {
                    "dump's note is not usable"
                } else {
                    "dump has no note"
                };
                format!("the memory, at {phys:#x}: the {why}")
            }
        },
        kaslr_offset: info.get("KERNELOFFSET").map(str::to_owned),
        taint: taint.or_else(|| whos().find_map(taint::of_line)),
    }
}

/// Returns the machine, from the log's line `DMI: `. In newer kernels it follows the version of the firmware's tables.
fn machine(log: &Log) -> Option<String> {
    let is_version = |text: &String| text.starts_with("SMBIOS ") || text.starts_with("Legacy DMI ");
    lines_behind(log, "DMI: ").find(|text| !is_version(text))
}

/// Returns the first text behind `prefix` in the log.
fn line_behind(log: &Log, prefix: &str) -> Option<String> {
    lines_behind(log, prefix).next()
}

/// Returns all texts behind `prefix` in the kernel's messages.
fn lines_behind<'l>(log: &'l Log, prefix: &'l str) -> impl Iterator<Item = String> + 'l {
    let records = log.records.iter().filter(|record| record.is_of_kernel());
    records.filter_map(move |record| {
        let text = record.text.strip_prefix(prefix.as_bytes())?;
        let text = &text[..text.len().min(TEXT_MAX_BYTES)];
        Some(String::from_utf8_lossy(text).into_owned())
    })
}

fn modules(kernel: Option<&Kernel<'_>>, found: &Found, events: &[Event]) -> Option<ModulesReport> {
    let listed = kernel
        .zip(found.modules)
        .and_then(|(kernel, head)| taint::modules(kernel, head));
    listed.or_else(|| {
        let names = events
            .iter()
            .rev()
            .find_map(|event| event.modules.clone())?;
        let source = "the log";
        Some(ModulesReport { names, source })
    })
}

fn crash(kernel: Option<&Kernel<'_>>, log: Option<&Log>, events: Vec<Event>) -> CrashReport {
    const PANIC: &str = "Kernel panic - not syncing: ";
    let ending = events::ending(&events);
    let text = |event: &Event| event.title.trim_start_matches(PANIC).to_owned();
    CrashReport {
        panic: ending.panic.map(text),
        cause: ending.cause.map(text),
        uptime_at_least_ns: log.and_then(|log| log.records.iter().map(|r| r.time_ns).max()),
        time_unix_s: kernel.and_then(|kernel| kernel.info().crash_time()),
        events,
    }
}

impl LogReport {
    /// Describes a log.
    pub fn of(log: &Log) -> Self {
        Self {
            messages: log.records.len(),
            messages_lost: log.not_taken + log.unreadable,
            text: String::from_utf8_lossy(&log.text()).into_owned(),
        }
    }
}

fn memory(
    dump: &Dump,
    kernel: Option<&Kernel<'_>>,
    options: AnalysisOptions,
    problems: &mut Vec<String>,
) -> MemoryReport {
    let bytes = dump.ranges().iter().map(PhysRange::len).sum();
    let counted =
        kernel.map(|kernel| Pages::of(kernel).and_then(|pages| pages.count(dump.ranges())));
    let kinds = counted.and_then(|counted| noted(counted, "page types", problems));
    let own = dump.own();
    let left_out = match own {
        Some(own) => Some(PageCounts {
            free: own.free.get(),
            cache: own.cache.get(),
            cache_private: own.cache_private.get(),
            user: own.user.get(),
            unusable: own.unusable.get(),
            ..PageCounts::default()
        }),
        None => kinds
            .zip(dump.level())
            .map(|(kinds, level)| left_out(kinds, level)),
    };
    let scanned = options.scan.then(|| scan(dump));
    MemoryReport {
        bytes,
        pages: bytes / PAGE,
        pages_in_file: dump.pages_in_file(),
        kinds,
        zero: scanned
            .as_ref()
            .map(|s| s.zero)
            .or(own.map(|own| own.zero.get())),
        left_out,
        unreadable: match scanned {
            Some(scanned) => {
                problems.extend(scanned.first_error.map(|error| format!("a page: {error}")));
                Some(scanned.unreadable)
            }
            None => own.map(|own| own.unreadable.get()),
        },
    }
}

/// Returns the pages among `kinds` that a level leaves out.
fn left_out(kinds: PageCounts, level: u32) -> PageCounts {
    let when = |kind: PageKind, count| if kind.left_out_at(level) { count } else { 0 };
    PageCounts {
        free: when(PageKind::Free, kinds.free),
        cache: when(PageKind::Cache, kinds.cache),
        cache_private: when(PageKind::CachePrivate, kinds.cache_private),
        user: when(PageKind::User, kinds.user),
        unusable: when(PageKind::Unusable, kinds.unusable),
        ..PageCounts::default()
    }
}

#[derive(Default)]
struct Scanned {
    zero: u64,
    unreadable: u64,
    first_error: Option<String>,
}

/// Reads all pages in the dump.
fn scan(dump: &Dump) -> Scanned {
    let mut scanned = Scanned::default();
    let mut buf = vec![0; PAGE_BYTES * SCAN_PAGES];
    for range in dump.ranges() {
        let mut at = dump.next_present(range.start, range.end);
        while at < range.end {
            // Skip a hole in the file.
            let data = dump.next_data(at, range.end);
            if data > at {
                scanned.zero += (data - at) / PAGE;
                at = dump.next_present(data, range.end);
                continue;
            }
            let upto = range.end.min(at + (SCAN_PAGES * PAGE_BYTES) as u64);
            // At most SCAN_PAGES.
            let part = &mut buf[..usize::try_from(upto - at).unwrap_or(0)];
            let whole = dump.read(at, part).is_ok();
            for (number, page) in (0..).zip(part.chunks_exact_mut(PAGE_BYTES)) {
                let phys = at + number * PAGE;
                if !whole && dump.next_present(phys, phys + PAGE) != phys {
                    continue;
                }
                if !whole && let Err(error) = dump.read(phys, page) {
                    scanned.unreadable += 1;
                    scanned.first_error.get_or_insert_with(|| error.to_string());
                    continue;
                }
                scanned.zero += u64::from(page.iter().all(|byte| *byte == 0));
            }
            at = dump.next_present(upto, range.end);
        }
    }
    scanned
}
