//! Stops a generation for good: kills everything that belongs to it, and confirms that it is gone.
//!
//! If a cgroup contains the generation, the kernel kills all of it at once and reports when the last process has
//! ended; processes that left the cgroup are found by their marks. Otherwise only the marks identify processes
//! ([`crate::marks`]), and two scans in a row must find none. In that case recorded processes are killed last: while
//! they live, their descendants can be identified.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use kmp_proto::fence::{Confirmation, FenceCertificate, FenceMethod, FenceOrder};
use rustix::process::Signal;
use tokio::time::Instant;

use crate::cgroup::Cgroup;
use crate::contract::{BackendError, FenceUnconfirmed, Fenced, Placement, ProcessId, Proof};
use crate::looks;
use crate::process::{self, Exits, Stat};

/// Maximum time for the confirmation of a fence.
pub const FENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two scans while a process still runs.
const LOOK_PAUSE: Duration = Duration::from_millis(1);
/// Number of consecutive scans without a result that confirm the end of a generation without a cgroup: a process
/// that forks while it is killed can escape the first one.
const EMPTY_SCANS: u32 = 2;
/// Maximum number of processes named in an error.
const NAMED_MAX: usize = 16;

/// Refuses to release a generation with the certificate of another one.
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

/// Stops the generation of `placement` and certifies its end. Can be repeated. `host_boot_id` is the current one.
///
/// # Errors
/// If its end was not observed within [`FENCE_TIMEOUT`], with the remaining processes.
pub(crate) async fn fence(
    placement: &Placement,
    exits: &Exits,
    host_boot_id: &str,
    order: FenceOrder,
) -> Result<Fenced, FenceUnconfirmed> {
    if order.generation() != placement.generation {
        let reason = format!(
            "the placement belongs to generation {}",
            placement.generation
        );
        return Err(FenceUnconfirmed { order, reason });
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
    if placement.host_boot_id != host_boot_id {
        let (method, seen) = (FenceMethod::HostRebooted, Confirmation::OtherHostBoot);
        return Ok(Fenced {
            certificate: order.confirm(method, seen, nanos),
            proof: Proof::HostRebooted,
        });
    }
    match kill_all(&Arc::new(placement.clone()), FENCE_TIMEOUT).await {
        Ok(ended) => {
            reap(placement, exits);
            let method = match ended.killed {
                true => FenceMethod::ProcessesKilled,
                false => FenceMethod::AlreadyEnded,
            };
            Ok(Fenced {
                certificate: order.confirm(method, Confirmation::ProcessesGone, nanos),
                proof: ended.proof,
            })
        }
        Err(error) => Err(FenceUnconfirmed {
            order,
            reason: error.to_string(),
        }),
    }
}

/// All processes have ended.
struct Ended {
    /// True if there was a process to kill.
    killed: bool,
    proof: Proof,
}

/// Why the end of all processes is not confirmed.
#[derive(Debug, thiserror::Error)]
enum NotEnded {
    #[error("{0} did not end within {1:?}; end them, then recover the instance")]
    Runs(Remains, Duration),
    #[error("searching for its processes: {0}")]
    Unseen(#[from] io::Error),
}

/// The remains of a generation found by a scan; never empty.
#[derive(Debug)]
struct Remains {
    processes: Vec<Stat>,
    /// The cgroup, if the kernel reports it as populated.
    cgroup: Option<Cgroup>,
}

impl Remains {
    fn of(processes: Vec<Stat>, cgroup: Option<Cgroup>) -> Option<Self> {
        let nothing = processes.is_empty() && cgroup.is_none();
        (!nothing).then_some(Self { processes, cgroup })
    }

    /// Kills the remains. While other processes remain, recorded processes are only stopped, so that they start
    /// nothing and the others stay their descendants.
    fn kill(&self, placement: &Placement) -> io::Result<()> {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill()?;
        }
        let is_recorded = |stat: &Stat| placement.processes.iter().any(|known| stat.is(known));
        let others = self.processes.iter().any(|stat| !is_recorded(stat));
        for stat in &self.processes {
            let wait = others && is_recorded(stat);
            let signal = if wait { Signal::STOP } else { Signal::KILL };
            if let Some(fd) = process::open(&identity(stat))? {
                process::send(&fd, signal)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Remains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(cgroup) = &self.cgroup {
            write!(f, "the processes in cgroup {:?}", cgroup.path())?;
        }
        let between = if self.cgroup.is_some() { ": " } else { "" };
        for (index, stat) in self.processes.iter().take(NAMED_MAX).enumerate() {
            let between = if index == 0 { between } else { ", " };
            let name = std::fs::read(format!("/proc/{}/comm", stat.pid)).unwrap_or_default();
            let name = String::from_utf8_lossy(&name);
            let state = char::from(stat.state).escape_default();
            write!(
                f,
                "{between}process {} ({:?}, state {state})",
                stat.pid,
                name.trim_end()
            )?;
        }
        match self.processes.len().saturating_sub(NAMED_MAX) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

fn identity(stat: &Stat) -> ProcessId {
    ProcessId {
        role: "member".to_owned(),
        pid: stat.pid,
        start_ticks: stat.start_ticks,
    }
}

/// Kills processes until nothing of the generation is left.
async fn kill_all(placement: &Arc<Placement>, timeout: Duration) -> Result<Ended, NotEnded> {
    let deadline = Instant::now() + timeout;
    let mut killed = false;
    let mut empty_scans = 0;
    loop {
        // The last scan decides, even after the deadline: either its findings are reported, or nothing is left.
        let (remains, proof) = look(placement).await?;
        let Some(remains) = remains else {
            empty_scans += 1;
            if proof == Proof::CgroupEmpty || empty_scans == EMPTY_SCANS {
                return Ok(Ended { killed, proof });
            }
            continue;
        };
        if Instant::now() > deadline && killed {
            return Err(NotEnded::Runs(remains, timeout));
        }
        (killed, empty_scans) = (true, 0);
        remains.kill(placement)?;
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// Returns the remains of the generation, if any, and the proof of their absence.
async fn look(placement: &Arc<Placement>) -> io::Result<(Option<Remains>, Proof)> {
    let known = placement.containment.cgroup.as_ref().map(Cgroup::known);
    let proof = match known {
        // No visible cgroup: the proof rests on the scans.
        None | Some(Err(_)) => Proof::ScansEmpty,
        Some(Ok(Some(cgroup))) if cgroup.is_populated()? => {
            return Ok((Some(living(cgroup)), Proof::CgroupEmpty));
        }
        Some(Ok(_)) => Proof::CgroupEmpty,
    };
    let found = looks::members(Arc::clone(placement)).await?;
    Ok((Remains::of(found, None), proof))
}

/// Returns the live processes of a cgroup. The list can be empty while the last process is ending.
fn living(cgroup: Cgroup) -> Remains {
    let pids = cgroup.pids().into_iter();
    let processes = pids.filter_map(|pid| Stat::read(pid).ok().flatten());
    Remains {
        processes: processes.filter(|stat| !stat.is_over()).collect(),
        cgroup: Some(cgroup),
    }
}

/// Returns whether any part of a generation can still run.
///
/// # Errors
/// If that cannot be determined.
pub(crate) fn is_left(placement: &Placement) -> io::Result<bool> {
    if let Some(Ok(Some(cgroup))) = placement.containment.cgroup.as_ref().map(Cgroup::known)
        && cgroup.is_populated()?
    {
        return Ok(true);
    }
    Ok(!looks::members_now(placement)?.is_empty())
}

/// Reaps the recorded processes that are children of this daemon.
fn reap(placement: &Placement, exits: &Exits) {
    for process in &placement.processes {
        if let Ok(Some(fd)) = process::open(process) {
            exits.reap(process, &fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;

    use super::*;
    use crate::contract::{BackendKind, Containment, Endpoint};

    fn nobody() -> Placement {
        Placement {
            backend: BackendKind::Embedded,
            name: "web".parse().unwrap(),
            generation: 1,
            processes: Vec::new(),
            endpoint: Endpoint::Vsock { cid: 3 },
            run_dir: "/nonexistent/web/1".into(),
            cpus: Vec::new(),
            memory_bytes: 0,
            kernel_release: String::new(),
            host_boot_id: kmorph_launch::boot_id().unwrap(),
            containment: Containment::default(),
            kernel_instance: None,
        }
    }

    #[tokio::test]
    async fn what_ends_as_the_time_runs_out_is_a_confirmed_fence() {
        // The deadline has passed at the first scan: a process that has ended by the second scan is not a failure.
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "echo; read line"])
            .env(crate::marks::FENCE_ENV, dir.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The process carries its mark: while a process starts its program, its environment is not readable for a
        // moment.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let mut placement = nobody();
        placement.run_dir = dir.path().to_owned();
        let placement = Arc::new(placement);
        let ended = kill_all(&placement, Duration::ZERO).await;
        let killed = child.wait();
        match ended {
            Ok(ended) => assert!(ended.killed),
            // On a busy machine the end of the process may take longer than the pause; then the error names it.
            Err(error) => assert!(
                error.to_string().contains(&child.id().to_string()),
                "{error}"
            ),
        }
        assert_eq!(killed.unwrap().signal(), Some(9));
        assert!(kill_all(&placement, Duration::ZERO).await.is_ok());
    }

    #[test]
    fn nothing_is_never_told_to_remain() {
        assert!(Remains::of(Vec::new(), None).is_none());
        let own = i32::try_from(std::process::id()).unwrap();
        let stat = Stat::read(own).unwrap().unwrap();
        let many = Remains::of(vec![stat; NAMED_MAX + 2], None).unwrap();
        let text = NotEnded::Runs(many, FENCE_TIMEOUT).to_string();
        assert!(text.starts_with(&format!("process {own} (\"")), "{text}");
        assert!(text.contains(" and 2 more did not end within 5s"), "{text}");
    }

    #[tokio::test]
    async fn another_boot_of_the_host_has_nothing_of_it_and_nobody_is_killed() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut placement = nobody();
        // A pid and start time that now belong to another process.
        placement.processes = vec![identity(&Stat::read(own).unwrap().unwrap())];
        placement.host_boot_id = "another".to_owned();
        let boot_id = kmorph_launch::boot_id().unwrap();
        let exits = Exits::default();
        let order = FenceOrder::new(1);
        let fenced = fence(&placement, &exits, &boot_id, order).await.unwrap();
        assert_eq!(fenced.proof, Proof::HostRebooted);
        assert_eq!(fenced.certificate.method(), FenceMethod::HostRebooted);
    }
}
