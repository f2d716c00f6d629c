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
//! Invariants: what has the name of a vmcore is complete and verified. One memory is captured at a time. Whoever
//! began a capture and no longer waits for it has stopped it.

mod files;

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use kmorph_backends::contract::{MemoryRange, REGISTERS};
use kmorph_vmcore::analysis::events::{EventKind, events};
use kmorph_vmcore::dump::PrStatus;
use kmorph_vmcore::kernel::Kernel;
use kmorph_vmcore::paced::{Paced, Rate};
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output, WriteError};
use kmorph_vmcore::{Dump, MemoryFile, MemoryPart, PhysRange, PhysicalMemory};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

pub use files::Retention;
use files::{Files, Place};

use crate::journal::GenerationRow;
use crate::services::Services;

/// Longest time for one capture.
pub const CAPTURE_TIMEOUT: Duration = Duration::from_secs(600);
/// How much the capturing threads stand back behind everything else: a nice value.
const CAPTURE_NICE: i32 = 10;
/// Bytes of the log's end that are told with the event.
pub const LOG_TAIL_BYTES: usize = 16 * 1024;
/// Who may look into the directory of vmcores: memory holds secrets.
const DIRECTORY_MODE: u32 = 0o700;

/// How memory is captured.
#[derive(Clone, Debug, PartialEq)]
pub struct VmcoreSettings {
    /// Where vmcores go: a directory for each instance below it.
    pub dir: PathBuf,
    /// Kinds of pages that are left out, 0 to 31, as makedumpfile's `-d`.
    pub level: u32,
    /// The format.
    pub output: Output,
    /// Threads that read and pack.
    pub threads: usize,
    /// How fast memory is read; as fast as it goes without.
    pub rate: Option<Rate>,
    /// Which older ones are kept.
    pub retention: Retention,
}

/// Lets one memory be captured at a time: what a capture needs of the daemon's memory is bounded then.
#[derive(Clone, Debug)]
pub struct Captures(Arc<Semaphore>);

impl Default for Captures {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

/// The log of a kernel that died.
#[derive(Clone, Debug)]
pub struct KernelLog {
    /// The file that holds it.
    pub path: PathBuf,
    /// What it says of the kernel's end.
    pub panic: Option<String>,
    /// Its end, at most [`LOG_TAIL_BYTES`].
    pub tail: String,
}

/// A vmcore.
#[derive(Clone, Debug)]
pub struct Dumped {
    /// The file.
    pub path: PathBuf,
    /// Its length, bytes.
    pub bytes: u64,
    /// Why pages are in it that should have been left out.
    pub not_filtered: Option<String>,
}

/// Why there is no vmcore.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Nothing of its memory is left, or the backend cannot say where it is.
    #[error("its memory cannot be captured: {0}")]
    Memory(String),
    /// Its memory cannot be read.
    #[error("opening its memory {path:?}: {source}")]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// There is nowhere to put it.
    #[error("the directory {path:?} for vmcores cannot be made: {source}; see vmcore.dir")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// It took too long.
    #[error("it took longer than {CAPTURE_TIMEOUT:?} and was given up")]
    TimedOut,
    /// The thread ended without a word.
    #[error("the capture ended by a fault in kmorphd")]
    Fault,
}

/// A capture under way.
#[derive(Debug)]
pub struct Capture {
    /// The log, as soon as it is in its file, or why there is none.
    pub log: oneshot::Receiver<Result<KernelLog, String>>,
    /// The dump.
    pub dumping: Dumping,
}

/// The dump of a [`Capture`]. Dropped, it is stopped.
#[derive(Debug)]
pub struct Dumping {
    dump: oneshot::Receiver<Result<Dumped, CaptureError>>,
    _stop: StopOnDrop,
}

#[derive(Debug)]
struct StopOnDrop(Arc<Control>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl Dumping {
    /// Waits for it.
    ///
    /// # Errors
    /// When there is no vmcore, and why.
    pub async fn done(self) -> Result<Dumped, CaptureError> {
        match tokio::time::timeout(CAPTURE_TIMEOUT, self.dump).await {
            Ok(Ok(dumped)) => dumped,
            Ok(Err(_)) => Err(CaptureError::Fault),
            Err(_) => Err(CaptureError::TimedOut),
        }
    }
}

struct Order {
    memory: Vec<MemoryRange>,
    registers: PathBuf,
    place: Place,
    settings: VmcoreSettings,
    _turn: OwnedSemaphorePermit,
}

/// Begins to capture the memory of a fenced generation, when its turn has come.
///
/// # Errors
/// When its memory is not there.
pub async fn begin(services: &Services, row: &GenerationRow) -> Result<Capture, CaptureError> {
    let gone = || CaptureError::Memory("nothing of it is left".to_owned());
    let turn = services.captures.0.clone().acquire_owned().await;
    let placement = row.placement.as_ref().ok_or_else(gone)?;
    let map = services.backend.memory_map(placement).await;
    let memory = map.map_err(|error| CaptureError::Memory(error.to_string()))?;
    if memory.is_empty() {
        return Err(gone());
    }
    let settings = services.settings.borrow().vmcore.clone();
    let order = Order {
        memory,
        registers: row.run_dir.join(REGISTERS),
        place: Place {
            dir: settings.dir.join(&row.instance),
            generation: row.generation,
        },
        settings,
        _turn: turn.map_err(|_| CaptureError::Fault)?,
    };
    let control = Arc::new(Control::default());
    let (log_told, log) = oneshot::channel();
    let (dump_told, dump) = oneshot::channel();
    let dumping = Dumping {
        dump,
        _stop: StopOnDrop(control.clone()),
    };
    let work = move || {
        // Its own priority, and that of the threads it starts: the kernel keeps one for each thread.
        let _ = rustix::process::setpriority_process(None, CAPTURE_NICE);
        let _ = dump_told.send(capture(&order, &control, log_told));
    };
    let name = "vmcore".to_owned();
    let thread = std::thread::Builder::new().name(name).spawn(work);
    thread.map_err(|error| CaptureError::Memory(format!("no thread for it: {error}")))?;
    Ok(Capture { log, dumping })
}

fn capture(
    order: &Order,
    control: &Control,
    log_told: oneshot::Sender<Result<KernelLog, String>>,
) -> Result<Dumped, CaptureError> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(&order.place.dir);
    made.map_err(|source| CaptureError::Directory {
        path: order.place.dir.clone(),
        source,
    })?;
    if let Some((path, bytes)) = order.place.complete() {
        // An earlier daemon captured it, and ended before it could say so.
        return Ok(Dumped {
            path,
            bytes,
            not_filtered: None,
        });
    }
    order.place.remove_partial();
    let files = order.place.files(&crate::wall_clock::now_rfc3339());
    let memory = open(&order.memory)?;
    let kernel = Kernel::in_memory(&memory).map_err(|error| error.to_string());
    let log = kernel.as_ref().map_err(Clone::clone);
    let _ = log_told.send(log.and_then(|kernel| save_log(kernel, &files)));
    let cpus = registers(&order.registers);
    // The log was read without a limit: it must be told at once.
    let paced = order.settings.rate.map(|rate| Paced::new(&memory, rate));
    let contents = Contents {
        memory: match &paced {
            Some(paced) => paced as &dyn PhysicalMemory,
            None => &memory,
        },
        kernel: kernel.as_ref().ok(),
        cpus: &cpus,
        level_of_source: 0,
    };
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let options = Options {
        output: order.settings.output,
        level: order.settings.level,
        threads: order.settings.threads,
        time: since_1970.unwrap_or_default(),
    };
    let written = writer::write(contents, options, control, &files.vmcore)?;
    order.place.prune(&order.settings.retention);
    Ok(Dumped {
        path: files.vmcore,
        bytes: written.note.file_bytes.get(),
        not_filtered: written.not_filtered,
    })
}

/// The ranges as one memory. They lie in one file: a backend has one memory for a guest.
fn open(ranges: &[MemoryRange]) -> Result<MemoryFile, CaptureError> {
    let Some(first) = ranges.first() else {
        return Err(CaptureError::Memory("there is none".to_owned()));
    };
    let path = first.host_path.clone();
    if ranges.iter().any(|range| range.host_path != path) {
        let text = "it lies in more than one file";
        return Err(CaptureError::Memory(text.to_owned()));
    }
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

/// What was saved of the CPUs before the fence; nothing where there is no such file, or none that can be read.
fn registers(path: &Path) -> Vec<PrStatus> {
    let dump = Dump::open(path).ok().and_then(Result::ok);
    let cpus = dump.into_iter().flat_map(|dump| dump.notes().cpus.clone());
    cpus.map(|cpu| cpu.status).collect()
}

fn save_log(kernel: &Kernel<'_>, files: &Files) -> Result<KernelLog, String> {
    let log = kernel.log().map_err(|error| error.to_string())?;
    let text = log.text();
    files
        .save_log(&text)
        .map_err(|error| format!("writing {:?}: {error}", files.log))?;
    let told = events(&log);
    let last = told.iter().rev();
    let panic = last
        .clone()
        .find(|event| event.kind == EventKind::Panic)
        .or_else(|| last.clone().find(|event| event.kind != EventKind::Warning));
    let tail = &text[text.len().saturating_sub(LOG_TAIL_BYTES)..];
    Ok(KernelLog {
        path: files.log.clone(),
        panic: panic.map(|event| event.title.clone()),
        tail: String::from_utf8_lossy(tail).into_owned(),
    })
}
