//! Captures the memory of a fenced generation into a file; its kernel's log first.
//!
//! ```text
//!  RecoveryJob ─▶ begin ─▶ a thread of its own, at low priority
//!       ▲                    │ the kernel's log ─▶ <generation>-<time>.dmesg
//!       ├──── log ◀──────────┤
//!       │                    │ the memory, filtered ─▶ <generation>-<time>.vmcore.partial
//!       └──── dump ◀─────────┘ synced, verified, renamed; then older ones give way
//! ```
//!
//! If configured, survivors read a part of the memory: see `survivors`.
//!
//! A capture on request works the same way, with a file that the user names: see [`by_hand`].
//!
//! Invariants: a file with the name of a vmcore is complete and verified. The daemon captures one memory at a time.
//! Dropping a capture stops it.

pub mod by_hand;
mod files;
pub(crate) mod proof;
mod survivors;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kmorph_backends::contract::{MemoryRange, REGISTERS};
use kmorph_files::{OwnDir, PRIVATE_DIR};
use kmorph_vmcore::analysis::events::{Ending, Event, ending, events};
use kmorph_vmcore::dump::PrStatus;
use kmorph_vmcore::kernel::Kernel;
use kmorph_vmcore::kernel::log::Log;
use kmorph_vmcore::memory::PAGE_BYTES;
use kmorph_vmcore::paced::{Pace, Paced};
use kmorph_vmcore::writer::shares::Shares;
use kmorph_vmcore::writer::{self, Contents, Control, Options, WriteError};
use kmorph_vmcore::{Dump, MemoryFile, MemoryPart, PhysRange, PhysicalMemory};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

use files::{Files, Place};
pub use survivors::SURVIVORS_MAX;
pub(crate) use survivors::take_back_left;
use survivors::{Borrowers, Job};

use crate::generation::Generations;
use crate::generation::freezing::NotFrozen;
use crate::model::generation::AnyGeneration;
use crate::model::guest_text;
use crate::model::settings::VmcoreSettings;
use crate::platform::{Platform, ambient, wall_clock};

/// Maximum time for one capture.
pub const CAPTURE_TIMEOUT: Duration = Duration::from_secs(600);
/// Maximum time for a stopped capture to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Nice value of the capture threads.
const CAPTURE_NICE: i32 = 10;
/// Bytes of the log's tail in the event.
pub const LOG_TAIL_BYTES: usize = 16 * 1024;

/// Captures memory, one capture at a time, so that the daemon's own memory use is bounded. Cheap to clone; stays on
/// its thread.
#[derive(Clone)]
pub struct Captures {
    pub(crate) platform: Platform,
    pub(crate) generations: Generations,
    turn: Arc<Semaphore>,
    borrowers: Borrowers,
}

impl Captures {
    /// Starts without a capture under way.
    pub fn new(platform: Platform, generations: Generations) -> Self {
        Self {
            platform,
            generations,
            turn: Arc::new(Semaphore::new(1)),
            borrowers: Borrowers::default(),
        }
    }

    /// Begins to capture the memory of a fenced generation when its turn has come. Asks as many survivors as
    /// configured to help.
    ///
    /// # Errors
    /// When the memory is not available.
    pub async fn begin(
        &self,
        row: &AnyGeneration,
        survivors: Vec<AnyGeneration>,
    ) -> Result<Capture, CaptureError> {
        let turn = self.later().await?;
        let dir = self.platform.settings.borrow().vmcore.dir.clone();
        let place = Place {
            dir: dir.join(&row.instance),
            generation: row.generation,
        };
        begin_into(self, row, survivors, Target::Kept(place), turn).await
    }

    /// Returns the turn, if it is free now.
    pub(crate) fn now(&self) -> Option<Turn> {
        let turn = self.turn.clone().try_acquire_owned();
        turn.ok().map(Turn)
    }

    /// Waits for the turn.
    async fn later(&self) -> Result<Turn, CaptureError> {
        let turn = self.turn.clone().acquire_owned().await;
        turn.map(Turn).map_err(|_| CaptureError::Fault)
    }
}

/// The turn to capture, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(
    #[expect(dead_code, reason = "it is there to be dropped")] OwnedSemaphorePermit,
);

/// The log of a kernel.
#[derive(Clone, Debug)]
pub struct KernelLog {
    /// The log file, if the log is stored separately from the dump.
    pub path: Option<PathBuf>,
    /// How the kernel ended: the panic, and the fault that led to it.
    pub panic: Option<String>,
    /// The tail of the log, at most [`LOG_TAIL_BYTES`].
    pub tail: String,
}

/// A vmcore.
#[derive(Clone, Debug)]
pub struct Dumped {
    /// The file.
    pub path: PathBuf,
    /// Its length, bytes.
    pub bytes: u64,
    /// Why the vmcore contains pages that the filter should have left out.
    pub not_filtered: Option<String>,
    /// Bytes of memory read by each survivor, by name.
    pub read_by: BTreeMap<String, u64>,
}

/// Why there is no vmcore.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// No memory is left, or the backend cannot locate it.
    #[error("its memory cannot be captured: {0}")]
    Memory(String),
    /// The memory cannot be read.
    #[error("opening its memory {path:?}: {source}")]
    Open {
        /// Its expected path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The directory for vmcores cannot be created.
    #[error("the directory {path:?} for vmcores cannot be made: {source}; see vmcore.dir")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The freeze mark could not be written to the journal.
    #[error("{0}; it was not frozen")]
    Journal(String),
    /// The generation could not be frozen.
    #[error("it cannot be read while it runs: {0}")]
    Freeze(String),
    /// The vmcore could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The capture timed out.
    #[error("it took longer than {CAPTURE_TIMEOUT:?} and was given up")]
    TimedOut,
    /// The thread ended without a result.
    #[error("the capture ended by a fault in kmorphd")]
    Fault,
}

impl From<NotFrozen> for CaptureError {
    fn from(error: NotFrozen) -> Self {
        match error {
            NotFrozen::Journal(reason) => Self::Journal(reason),
            NotFrozen::Backend(reason) => Self::Freeze(reason),
        }
    }
}

/// A capture under way.
#[derive(Debug)]
pub struct Capture {
    /// The log as soon as its file is written, or the reason why there is none.
    pub log: oneshot::Receiver<Result<KernelLog, String>>,
    /// Notified once the memory is no longer read.
    pub read: Arc<Notify>,
    /// The dump.
    pub dumping: Dumping,
}

/// The dump of a [`Capture`]. Dropping it stops the dump.
#[derive(Debug)]
pub struct Dumping {
    dump: oneshot::Receiver<Result<Dumped, CaptureError>>,
    stop: StopOnDrop,
    bytes: u64,
    /// When the capture times out.
    deadline: Instant,
}

#[derive(Debug)]
struct StopOnDrop(Arc<Control>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl Dumping {
    /// Waits for the dump, until [`CAPTURE_TIMEOUT`] after its begin. The call can be cancelled and repeated.
    ///
    /// # Errors
    /// The reason why there is no vmcore.
    pub async fn done(&mut self) -> Result<Dumped, CaptureError> {
        match tokio::time::timeout_at(self.deadline, &mut self.dump).await {
            Ok(Ok(dumped)) => dumped,
            Ok(Err(_)) => Err(CaptureError::Fault),
            Err(_) => Err(CaptureError::TimedOut),
        }
    }

    /// Returns the number of bytes of memory written or left out, and the total.
    pub fn progress(&self) -> (u64, u64) {
        let pages = self.stop.0.pages_done.load(Ordering::Relaxed);
        (
            pages.saturating_mul(PAGE_BYTES as u64).min(self.bytes),
            self.bytes,
        )
    }

    /// Stops the dump and waits for its end. `None` after [`STOP_TIMEOUT`].
    pub async fn stop(self) -> Option<Result<Dumped, CaptureError>> {
        let Self { dump, stop, .. } = self;
        drop(stop);
        let ended = tokio::time::timeout(STOP_TIMEOUT, dump).await.ok()?;
        Some(ended.unwrap_or(Err(CaptureError::Fault)))
    }
}

struct Order {
    memory: Vec<MemoryRange>,
    registers: PathBuf,
    target: Target,
    settings: VmcoreSettings,
    pace: Option<Arc<Pace>>,
    shares: Option<Arc<Shares>>,
    read_by: survivors::Read,
    _turn: Turn,
}

impl Drop for Order {
    /// Wakes the tasks that wait for the read, however the capture ended.
    fn drop(&mut self) {
        if let Some(shares) = &self.shares {
            shares.end();
        }
    }
}

/// The destination of a capture.
enum Target {
    /// The kept captures of an instance.
    Kept(Place),
    /// This file; the log is only reported.
    File(PathBuf),
}

impl Target {
    /// Returns whether this generation already has a vmcore. Checks the disk on another thread.
    async fn is_complete(&self) -> bool {
        let Self::Kept(place) = self else {
            return false;
        };
        let place = place.clone();
        let look = ambient::blocking(move || place.complete().is_some());
        look.await.unwrap_or(false)
    }
}

async fn begin_into(
    captures: &Captures,
    row: &AnyGeneration,
    mut survivors: Vec<AnyGeneration>,
    target: Target,
    turn: Turn,
) -> Result<Capture, CaptureError> {
    let gone = || CaptureError::Memory("nothing of it is left".to_owned());
    let placement = row.placement().ok_or_else(gone)?;
    let memory = match target.is_complete().await {
        // The generation was captured already, before its memory was released.
        true => Vec::new(),
        false => {
            let map = captures
                .generations
                .machine
                .backend
                .memory_map(placement)
                .await;
            let memory = map.map_err(|error| CaptureError::Memory(error.to_string()))?;
            (!memory.is_empty()).then_some(memory).ok_or_else(gone)?
        }
    };
    let bytes = memory.iter().map(|range| range.length).sum();
    let settings = captures.platform.settings.borrow().vmcore.clone();
    let pace = settings.rate.map(|rate| Arc::new(Pace::new(rate)));
    survivors.truncate(settings.survivors.min(SURVIVORS_MAX));
    let mut order = Order {
        memory,
        registers: row.run_dir.join(REGISTERS),
        target,
        settings,
        pace,
        shares: None,
        read_by: survivors::Read::default(),
        _turn: turn,
    };
    let read = Arc::new(Notify::new());
    let tell_read = read.clone();
    let mut control = Control::telling_when_read(move || tell_read.notify_one());
    if !survivors.is_empty() {
        let capture = captures
            .generations
            .resources
            .numbers
            .borrow_mut()
            .next_session();
        let job = Job::new(capture, row.generation, &order.memory, order.pace.clone())?;
        let shares = Arc::<Shares>::default();
        control.shares = Some(Arc::clone(&shares));
        order.read_by = job.ask(captures, survivors, &shares);
        order.shares = Some(shares);
    }
    let control = Arc::new(control);
    let (log_told, log) = oneshot::channel();
    let (dump_told, dump) = oneshot::channel();
    let dumping = Dumping {
        dump,
        stop: StopOnDrop(control.clone()),
        bytes,
        deadline: Instant::now() + CAPTURE_TIMEOUT,
    };
    let work = move || {
        let _ = dump_told.send(capture(&order, &control, log_told));
    };
    let thread = ambient::thread("vmcore", Some(CAPTURE_NICE), work);
    thread.map_err(|error| CaptureError::Memory(format!("no thread for it: {error}")))?;
    Ok(Capture { log, read, dumping })
}

fn capture(
    order: &Order,
    control: &Control,
    log_told: oneshot::Sender<Result<KernelLog, String>>,
) -> Result<Dumped, CaptureError> {
    match &order.target {
        Target::File(path) => dump(order, control, path, |kernel| {
            let _ = log_told.send(kernel.and_then(|kernel| Ok(read_log(kernel)?.1)));
        }),
        Target::Kept(place) => {
            make_directory(&place.dir)?;
            if let Some((files, bytes)) = place.complete() {
                // An earlier daemon captured it, and ended before it could report that.
                let _ = log_told.send(log_of(&files));
                return Ok(Dumped {
                    path: files.vmcore,
                    bytes,
                    not_filtered: None,
                    read_by: BTreeMap::new(),
                });
            }
            place.remove_partial();
            let files = place.files(&wall_clock::now_rfc3339());
            let dumped = dump(order, control, &files.vmcore, |kernel| {
                let _ = log_told.send(kernel.and_then(|kernel| save_log(kernel, &files)));
            })?;
            place.prune(&order.settings.retention);
            Ok(dumped)
        }
    }
}

/// Creates a directory for vmcores, private because memory contains secrets.
fn make_directory(path: &Path) -> Result<(), CaptureError> {
    match OwnDir::make(path, PRIVATE_DIR) {
        Ok(_) => Ok(()),
        Err(refusal) => Err(CaptureError::Directory {
            path: path.to_owned(),
            source: refusal.into(),
        }),
    }
}

/// Writes the memory to `path`; reports the kernel's log before it reads all of the memory.
fn dump(
    order: &Order,
    control: &Control,
    path: &Path,
    tell_log: impl FnOnce(Result<&Kernel<'_>, String>),
) -> Result<Dumped, CaptureError> {
    let memory = open(&order.memory)?;
    let kernel = Kernel::in_memory(&memory).map_err(|error| error.to_string());
    tell_log(kernel.as_ref().map_err(Clone::clone));
    let cpus = registers(&order.registers);
    // The log was read without a rate limit, so that it is reported at once.
    let pace = order.pace.as_deref();
    let paced = pace.map(|pace| Paced::new(&memory, pace));
    let contents = Contents {
        memory: match &paced {
            Some(paced) => paced as &dyn PhysicalMemory,
            None => &memory,
        },
        kernel: kernel.as_ref().ok(),
        cpus: &cpus,
        level_of_source: 0,
    };
    let options = Options {
        output: order.settings.output,
        level: order.settings.level,
        threads: order.settings.threads,
        time: Duration::from_nanos(wall_clock::now_unix_ns()),
    };
    let written = writer::write(contents, options, control, path)?;
    Ok(Dumped {
        path: path.to_owned(),
        bytes: written.note.file_bytes.get(),
        not_filtered: written.not_filtered,
        read_by: order.read_by.all(),
    })
}

/// Returns the file that contains all ranges: a backend has one memory file for a guest.
fn file_of(ranges: &[MemoryRange]) -> Result<&Path, CaptureError> {
    let Some(first) = ranges.first() else {
        return Err(CaptureError::Memory("there is none".to_owned()));
    };
    if ranges
        .iter()
        .any(|range| range.host_path != first.host_path)
    {
        let text = "it lies in more than one file";
        return Err(CaptureError::Memory(text.to_owned()));
    }
    Ok(&first.host_path)
}

/// Opens the ranges as one memory.
fn open(ranges: &[MemoryRange]) -> Result<MemoryFile, CaptureError> {
    let path = file_of(ranges)?.to_owned();
    let part = |range: &MemoryRange| MemoryPart {
        range: PhysRange {
            start: range.guest_address,
            end: range.guest_address.saturating_add(range.length),
        },
        file_offset: range.host_offset,
    };
    let parts = ranges.iter().map(part).collect();
    File::open(&path)
        .and_then(|file| MemoryFile::new(file, parts))
        .map_err(|source| CaptureError::Open { path, source })
}

/// Returns the CPU registers saved before the fence; empty if the file is missing or unreadable.
fn registers(path: &Path) -> Vec<PrStatus> {
    let dump = Dump::open(path).ok().and_then(Result::ok);
    let cpus = dump.into_iter().flat_map(|dump| dump.notes().cpus.clone());
    cpus.map(|cpu| cpu.status).collect()
}

/// Returns how the kernel ended, as its log says: the panic, and the fault that led to it.
fn end_in(log: &Log) -> Option<String> {
    let told = events(log);
    let Ending { panic, cause } = ending(&told);
    // "Fatal exception" alone does not name the cause.
    let title = |event: &Event| guest_text::line(&event.title);
    match (panic.map(title), cause.map(title)) {
        (Some(panic), Some(cause)) => Some(format!("{panic}, after {cause}")),
        (panic, cause) => panic.or(cause),
    }
}

/// Returns the log as text, and its summary.
fn read_log(kernel: &Kernel<'_>) -> Result<(Vec<u8>, KernelLog), String> {
    let log = kernel.log().map_err(|error| error.to_string())?;
    let text = log.text();
    let end = end_in(&log);
    let tail = &text[text.len().saturating_sub(LOG_TAIL_BYTES)..];
    let log = KernelLog {
        path: None,
        panic: end,
        tail: guest_text::lines(&String::from_utf8_lossy(tail)),
    };
    Ok((text, log))
}

/// Returns the log of a kernel whose memory is already captured.
fn log_of(files: &Files) -> Result<KernelLog, String> {
    let dump = Dump::open(&files.vmcore).map_err(|error| error.to_string())?;
    let dump = dump.map_err(|error| error.to_string())?;
    let kernel = Kernel::in_dump(&dump).map_err(|error| error.to_string())?;
    save_log(&kernel, files)
}

/// Reads the log, and writes the file unless an earlier capture has done so.
fn save_log(kernel: &Kernel<'_>, files: &Files) -> Result<KernelLog, String> {
    let (text, log) = read_log(kernel)?;
    if !files.log.exists() {
        files
            .save_log(&text)
            .map_err(|error| format!("writing {:?}: {error}", files.log))?;
    }
    let path = Some(files.log.clone());
    Ok(KernelLog { path, ..log })
}

#[cfg(test)]
mod tests {
    use kmorph_vmcore::kernel::log::Record;

    use super::*;

    /// Returns the reported end of a log with these lines; lines that begin with `>` come from a program.
    fn told(lines: &str) -> Option<String> {
        let records = (0..).zip(lines.lines()).map(|(time_ns, line)| Record {
            time_ns,
            caller: 0,
            facility: u8::from(line.starts_with('>')),
            text: line.trim_start_matches('>').as_bytes().to_vec(),
        });
        end_in(&Log {
            records: records.collect(),
            ..Log::default()
        })
    }

    #[test]
    fn an_end_is_told_with_the_fault_that_led_to_it() {
        let fault = "BUG: kernel NULL pointer dereference, address: 0000000000000008\n\
            #PF: supervisor read access in kernel mode\nOops: 0000 [#1] PREEMPT SMP NOPTI\n\
            CPU: 0 PID: 77 Comm: insmod Tainted: G           OE      6.1.0 #1\n\
            ---[ end trace 0000000000000000 ]---\n";
        let fatal = "Kernel panic - not syncing: Fatal exception";
        let null = "BUG: kernel NULL pointer dereference, address: 0000000000000008";
        let sysrq = "Kernel panic - not syncing: sysrq triggered crash";
        let faked = ">Kernel panic - not syncing: a fake";
        for (lines, expected) in [
            (format!("{fault}{fatal}"), format!("{fatal}, after {null}")),
            // The kernel survived the fault, and ended for another reason.
            (format!("{fault}{sysrq}"), sysrq.to_owned()),
            (
                format!("{fault}{fatal}\n{faked}"),
                format!("{fatal}, after {null}"),
            ),
            (fatal.to_owned(), fatal.to_owned()),
        ] {
            assert_eq!(told(&lines), Some(expected), "{lines}");
        }
        assert_eq!(told(&format!("Linux version 6.1\n{faked}")), None);
    }

    #[tokio::test]
    async fn a_capture_that_is_looked_at_again_and_again_ends_in_its_time_all_the_same() {
        let (_never, dump) = oneshot::channel();
        let control = Arc::new(Control::default());
        let mut dumping = Dumping {
            dump,
            stop: StopOnDrop(control.clone()),
            bytes: 0,
            deadline: Instant::now() + Duration::from_millis(50),
        };
        let mut looks = 0;
        let ended = loop {
            tokio::select! {
                ended = dumping.done() => break ended,
                () = tokio::time::sleep(Duration::from_millis(10)) => looks += 1,
            }
            assert!(looks < 1000, "it would never have ended");
        };
        assert!(matches!(ended, Err(CaptureError::TimedOut)), "{ended:?}");
        drop(dumping);
        assert!(control.stop.load(Ordering::Relaxed));
    }
}
