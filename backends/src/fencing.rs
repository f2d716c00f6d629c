//! Stopping a generation for good: everything that carries its mark is killed, and seen to be gone.
//!
//! A process belongs to a generation when it is in the session of one of its recorded processes, or
//! carries the generation's mark in the environment it was started with ([`FENCE_ENV`]), which every
//! descendant inherits also when it leaves the session. The fence kills until two scans in a row
//! find none.

use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};
use rustix::process::Signal;

use crate::contract::{BackendError, FenceUnconfirmed, Placement, ProcessId};
use crate::process::{self, Exits, Stat};

/// Environment variable that marks every process of a generation: its run directory.
pub const FENCE_ENV: &str = "KMORPH_FENCE";
/// Longest time for a fence to be confirmed.
pub const FENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two scans while something still runs.
const SCAN_PAUSE: Duration = Duration::from_millis(1);
/// Largest environment that is searched for the mark, bytes.
const ENVIRON_MAX_BYTES: u64 = 256 * 1024;

/// Refuses to release a generation on the proof that another one has ended.
pub(crate) fn check_proof(
    placement: &Placement,
    proof: &FenceCertificate,
) -> Result<(), BackendError> {
    if proof.generation() == placement.generation {
        return Ok(());
    }
    Err(BackendError {
        what: format!(
            "releasing {} generation {}",
            placement.name, placement.generation
        ),
        source: io::Error::new(
            io::ErrorKind::InvalidInput,
            "certificate of another generation",
        ),
    })
}

/// Stops the generation of `placement` and certifies it. Callable again.
///
/// # Errors
/// When its end was not seen within [`FENCE_TIMEOUT`].
pub(crate) async fn fence(
    placement: &Placement,
    exits: &Exits,
    order: FenceOrder,
) -> Result<FenceCertificate, FenceUnconfirmed> {
    if order.generation() != placement.generation {
        let reason = format!("the placement is of generation {}", placement.generation);
        return Err(FenceUnconfirmed { order, reason });
    }
    match tokio::time::timeout(FENCE_TIMEOUT, kill_all(placement, exits)).await {
        Ok(Ok(killed)) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let nanos = now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
            let method = if killed {
                FenceMethod::ProcessesKilled
            } else {
                FenceMethod::AlreadyEnded
            };
            Ok(order.confirm(method, Confirmation::ProcessesGone, nanos))
        }
        Ok(Err(error)) => Err(FenceUnconfirmed {
            order,
            reason: error.to_string(),
        }),
        Err(_) => {
            let left = members(placement).unwrap_or_default();
            let pids: Vec<_> = left.iter().map(|s| s.pid.to_string()).collect();
            let reason = format!(
                "processes {} did not end within {FENCE_TIMEOUT:?}",
                pids.join(", ")
            );
            Err(FenceUnconfirmed { order, reason })
        }
    }
}

/// The processes of a generation that can still run.
fn members(placement: &Placement) -> io::Result<Vec<Stat>> {
    let mark = mark_of(&placement.run_dir);
    let own = i32::try_from(std::process::id()).ok();
    let belongs = |stat: &Stat| {
        if own == Some(stat.pid) || stat.is_over() {
            return false;
        }
        let led = placement.processes.iter().any(|l| {
            stat.session == l.pid && stat.start_ticks >= l.start_ticks
                || stat.pid == l.pid && stat.start_ticks == l.start_ticks
        });
        led || has_mark(stat.pid, &mark) || stat.is_headless() && a_thread_has_mark(stat.pid, &mark)
    };
    Ok(process::all()?.into_iter().filter(belongs).collect())
}

/// Kills until nothing of the generation is left. True when there was something to kill.
async fn kill_all(placement: &Placement, exits: &Exits) -> io::Result<bool> {
    let mut killed = false;
    let mut empty_scans = 0;
    while empty_scans < 2 {
        let members = members(placement)?;
        if members.is_empty() {
            empty_scans += 1;
            continue;
        }
        empty_scans = 0;
        killed = true;
        let mut ending = Vec::new();
        for stat in members {
            let process = ProcessId {
                role: "member".to_owned(),
                pid: stat.pid,
                start_ticks: stat.start_ticks,
            };
            if let Some(fd) = process::open(&process)? {
                process::send(&fd, Signal::KILL)?;
                ending.push(process);
            }
        }
        let recorded = |pid| placement.processes.iter().any(|l| l.pid == pid);
        for process in ending.iter().filter(|p| recorded(p.pid)) {
            exits.wait(process).await?;
        }
        tokio::time::sleep(SCAN_PAUSE).await;
    }
    for process in &placement.processes {
        if let Some(fd) = process::open(process)? {
            exits.reap(process, &fd);
        }
    }
    Ok(killed)
}

/// The entry of the environment that marks the generation with this run directory.
pub(crate) fn mark_of(run_dir: &Path) -> Vec<u8> {
    let mut mark = format!("{FENCE_ENV}=").into_bytes();
    mark.extend_from_slice(run_dir.as_os_str().as_encoded_bytes());
    mark
}

/// Whether the environment that a process was started with carries this entry.
pub(crate) fn has_mark(pid: i32, entry: &[u8]) -> bool {
    carries(Path::new(&format!("/proc/{pid}/environ")), entry)
}

/// The same, asked of each thread: with the first one its view of the memory has gone.
fn a_thread_has_mark(pid: i32, entry: &[u8]) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut threads = threads.into_iter().flatten().flatten();
    threads.any(|thread| carries(&thread.path().join("environ"), entry))
}

fn carries(environ: &Path, entry: &[u8]) -> bool {
    let Ok(file) = std::fs::File::open(environ) else {
        return false;
    };
    let mut environ = Vec::new();
    if file
        .take(ENVIRON_MAX_BYTES)
        .read_to_end(&mut environ)
        .is_err()
    {
        return false;
    }
    environ.split(|b| *b == 0).any(|e| e == entry)
}
