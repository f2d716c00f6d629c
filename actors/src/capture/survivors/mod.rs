//! Survivors that help to read the memory of a fenced kernel.
//!
//! ```text
//!                 ┌───────────────── a share ─────────────────┐
//!  connect ─▶ lend ─▶ VMCORE_START ─▶ VMCORE_DATA … ─▶ VMCORE_COMPLETE
//!     │         │            └── fails: others read the share ──┐ nothing is left
//!     ▼         ▼                                               ▼
//!  others read all                             VMCORE_COMPLETE ─▶ the loan is taken back
//! ```
//!
//! Invariants: a capture waits for no survivor if others can read its share. The daemon takes lent memory back,
//! however the capture ends.

mod channel;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kmorph_backends::contract::{BackendError, MemoryRange};
use kmorph_vmcore::paced::Pace;
use kmorph_vmcore::writer::shares::{Helper, Shares};
use kmp_proto::message::{ErrorInfo, features};
use kmp_transport::connection::ConnectionError;
use kmp_transport::link::Address;
use kmp_transport::peer::{BulkError, open_bulk};
use slog::{info, warn};
use tokio::sync::Notify;

use self::channel::Lent;
use super::{CaptureError, Captures};
use crate::model::generation::AnyGeneration;
use crate::platform::transport::PeerKey;

/// Maximum number of survivors that help with one capture.
pub const SURVIVORS_MAX: usize = 8;
/// Instances that have borrowed memory, or whose memory is being taken back. Clones share the set.
#[derive(Clone, Debug, Default)]
pub(super) struct Borrowers(Arc<Borrowing>);

#[derive(Debug, Default)]
struct Borrowing {
    all: Mutex<BTreeSet<PeerKey>>,
    fewer: Notify,
}

/// One borrower; it leaves the set when it is dropped.
struct Borrower(Borrowers, PeerKey);

impl Borrowers {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<PeerKey>> {
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until this instance is no longer in the set: every user of the set has its own timeout.
    async fn join(&self, row: &AnyGeneration) -> Borrower {
        let key = PeerKey {
            instance: row.instance.clone(),
            generation: row.generation,
        };
        loop {
            let mut fewer = std::pin::pin!(self.0.fewer.notified());
            fewer.as_mut().enable();
            if self.lock().insert(key.clone()) {
                return Borrower(self.clone(), key);
            }
            fewer.await;
        }
    }
}

impl Drop for Borrower {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
        self.0.0.fewer.notify_waiters();
    }
}

/// Bytes that each survivor has read.
#[derive(Clone, Debug, Default)]
pub(super) struct Read(Arc<Mutex<BTreeMap<String, u64>>>);

impl Read {
    fn add(&self, survivor: &str, bytes: u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *all.entry(survivor.to_owned()).or_default() += bytes;
    }

    /// Returns the bytes read, by survivor name; survivors that have read nothing are absent.
    pub(super) fn all(&self) -> BTreeMap<String, u64> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.clone()
    }
}

/// A capture's memory, and how to read it.
pub(super) struct Job {
    /// Number of the capture.
    capture: u64,
    generation: u64,
    memory: Vec<MemoryRange>,
    pace: Option<Arc<Pace>>,
    read: Read,
    /// Keeps the file open, so that its path in `memory` names this file even if the memory is released in the
    /// meantime.
    _file: File,
}

impl Job {
    /// Creates a job for the memory of `generation`, which is in one file.
    pub(super) fn new(
        capture: u64,
        generation: u64,
        memory: &[MemoryRange],
        pace: Option<Arc<Pace>>,
    ) -> Result<Self, CaptureError> {
        let path = super::file_of(memory)?.to_owned();
        let file = File::open(&path).map_err(|source| CaptureError::Open { path, source })?;
        let own = PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            file.as_raw_fd()
        ));
        let range = |range: &MemoryRange| MemoryRange {
            host_path: own.clone(),
            ..range.clone()
        };
        Ok(Self {
            capture,
            generation,
            memory: memory.iter().map(range).collect(),
            pace,
            read: Read::default(),
            _file: file,
        })
    }

    /// Asks the survivors to help. The returned value always shows the bytes that each survivor has read so far.
    pub(super) fn ask(
        self,
        captures: &Captures,
        survivors: Vec<AnyGeneration>,
        shares: &Arc<Shares>,
    ) -> Read {
        let read = self.read.clone();
        let job = Arc::new(self);
        for row in survivors {
            let helper = Arc::new(shares.helper());
            actix::spawn(help(captures.clone(), row, Arc::clone(&job), helper));
        }
        read
    }
}

/// Why a survivor does not help, or no longer helps.
#[derive(Debug, thiserror::Error)]
enum HelpError {
    #[error("connecting: {0}")]
    Connect(#[from] BulkError),
    #[error("its agent cannot read other kernels' memory")]
    CannotRead,
    #[error("it cannot be lent memory")]
    CannotBorrow,
    #[error(transparent)]
    Lend(#[from] BackendError),
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("it refused: {}: {}", .0.code, .0.text)]
    Refused(ErrorInfo),
    #[error("it was silent for {0:?}")]
    Silent(Duration),
    #[error("it sent what it was not asked for: {0}")]
    NotAsked(&'static str),
    #[error("a chunk at {0:#x} does not have its checksum")]
    Damaged(u64),
    #[error("{announced} bytes were to come, {found} did")]
    OtherTotal { announced: u64, found: u64 },
}

/// Takes back memory that an earlier daemon lent to an instance that was found running.
pub(crate) fn take_back_left(captures: &Captures, row: &AnyGeneration) {
    let (captures, row) = (captures.clone(), row.clone());
    actix::spawn(async move {
        let _borrower = captures.borrowers.join(&row).await;
        let Some(placement) = row.placement() else {
            return;
        };
        if let Err(error) = captures
            .generations
            .machine
            .backend
            .take_back(placement)
            .await
        {
            warn!(captures.platform.log, "memory that was lent for a vmcore is not taken back";
                "instance" => &row.instance, "generation" => row.generation, "reason" => %error);
        }
    });
}

/// Handles one survivor until nothing is left to read or the survivor fails.
async fn help(captures: Captures, row: AnyGeneration, job: Arc<Job>, helper: Arc<Helper>) {
    let log = captures
        .platform
        .log
        .new(slog::o!("survivor" => row.instance.clone(),
        "survivor_generation" => row.generation, "capture" => job.capture));
    info!(log, "a survivor is asked to help with a vmcore");
    match borrow_and_read(&captures, &row, &job, helper).await {
        Ok(()) => {}
        Err(error @ (HelpError::CannotRead | HelpError::CannotBorrow)) => {
            info!(log, "a survivor does not help with a vmcore"; "reason" => %error);
        }
        Err(error) => {
            // The error may quote the answer of the survivor's agent.
            let reason = crate::model::guest_text::line(&error.to_string());
            warn!(log, "a survivor does not help with a vmcore any more"; "reason" => reason);
        }
    }
}

async fn borrow_and_read(
    captures: &Captures,
    row: &AnyGeneration,
    job: &Job,
    helper: Arc<Helper>,
) -> Result<(), HelpError> {
    let _borrower = captures.borrowers.join(row).await;
    let placement = row.placement().ok_or(HelpError::CannotBorrow)?;
    let speaker = captures.generations.machine.speaker(placement);
    let address = Address::from(placement.endpoint.clone());
    let connection = open_bulk(
        captures.platform.transport.network(),
        &address,
        speaker,
        job.capture,
    )
    .await?;
    if connection.features & features::READS_LENT_MEMORY == 0 {
        return Err(HelpError::CannotRead);
    }
    if helper.is_over() {
        return Ok(());
    }
    let loan = captures
        .generations
        .machine
        .backend
        .lend(placement, &job.memory)
        .await?;
    let loan = loan.ok_or(HelpError::CannotBorrow)?;
    let mut lent = Lent {
        connection,
        job,
        loan,
    };
    let read = lent.read_shares(&row.instance, helper).await;
    let read = match read {
        Ok(()) => lent.let_go().await,
        failed => failed,
    };
    // The agent releases the lent memory when the channel ends, at the latest.
    drop(lent);
    captures
        .generations
        .machine
        .backend
        .take_back(placement)
        .await?;
    read
}
