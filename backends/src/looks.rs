//! Shared scans of all processes of the host: when many generations are fenced at once, one scan serves all requests
//! made before it started.
//!
//! ```text
//! ask ──▶ waiting ──▶ a scan begins ──▶ answered
//!            ▲               │
//!            └── asked during a scan: the next one answers
//! ```
//!
//! A scan that started before a request proves nothing about the time after it, so it answers only earlier requests.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::contract::Placement;
use crate::marks::{self, Known};
use crate::process::Stat;

/// The processes of a generation found by a scan.
type Found = io::Result<Vec<Stat>>;

/// The requests for scans in this process. `/proc` covers the whole host, so one queue is enough.
static LOOKS: LazyLock<Looks> = LazyLock::new(Looks::default);

#[derive(Default)]
struct Looks {
    state: Mutex<State>,
    /// Used by the scanning thread.
    known: Mutex<Known>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Asked>,
    /// True while a thread scans; it takes the waiting requests when it has finished a scan.
    looks: bool,
}

struct Asked {
    placement: Arc<Placement>,
    answer: oneshot::Sender<Found>,
}

/// Returns the processes of a generation that can still run, without the daemon's own. The scan begins after this call.
///
/// # Errors
/// If `/proc` cannot be read, or no thread can be created.
pub(crate) async fn members(placement: Arc<Placement>) -> Found {
    let (answer, answered) = oneshot::channel();
    LOOKS.ask(Asked { placement, answer })?;
    let gone = |_| Err(io::Error::other("the thread that looked is gone"));
    answered.await.unwrap_or_else(gone)
}

/// As [`members`], but with a separate scan. Blocking.
///
/// # Errors
/// If `/proc` cannot be read.
pub(crate) fn members_now(placement: &Placement) -> Found {
    let sought = BTreeSet::from([marks::mark_of(&placement.run_dir)]);
    marks::members(placement, &Known::default().look(&sought)?)
}

impl Looks {
    fn ask(&'static self, asked: Asked) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.push(asked);
        if state.looks {
            return Ok(());
        }
        let thread = std::thread::Builder::new().name("process-look".to_owned());
        if let Err(error) = thread.spawn(|| self.answer_all()) {
            state.waiting.clear();
            return Err(error);
        }
        state.looks = true;
        Ok(())
    }

    fn answer_all(&self) {
        let _looks = Looking(self);
        while let Some(asked) = self.next() {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            look(asked, &mut known);
        }
    }

    /// Takes the waiting requests; if there are none, the thread ends.
    fn next(&self) -> Option<Vec<Asked>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.looks = !state.waiting.is_empty();
        state.looks.then(|| std::mem::take(&mut state.waiting))
    }
}

/// The scanning thread. If it panics, the waiting requests fail, and the next request starts a new thread.
struct Looking<'a>(&'a Looks);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.waiting.clear();
            state.looks = false;
        }
    }
}

fn look(asked: Vec<Asked>, known: &mut Known) {
    let mark = |asked: &Asked| marks::mark_of(&asked.placement.run_dir);
    let seen = known.look(&asked.iter().map(mark).collect());
    for Asked { placement, answer } in asked {
        let found = match &seen {
            Ok(seen) => marks::members(&placement, seen),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        let _ = answer.send(found);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::contract::{BackendKind, Containment, Endpoint};

    fn placement(run_dir: &std::path::Path) -> Arc<Placement> {
        Arc::new(Placement {
            backend: BackendKind::Embedded,
            name: "web".parse().unwrap(),
            generation: 1,
            processes: Vec::new(),
            endpoint: Endpoint::Vsock { cid: 3 },
            run_dir: run_dir.to_owned(),
            cpus: Vec::new(),
            memory_bytes: 0,
            kernel_release: String::new(),
            host_boot_id: String::new(),
            containment: Containment::default(),
            kernel_instance: None,
        })
    }

    /// Starts a process with the mark and waits until it runs: while it executes its program, its environment is empty
    /// for a moment.
    fn marked(run_dir: &std::path::Path) -> Child {
        let mut child = Command::new("sh")
            .args(["-c", "echo; read line"])
            .env(marks::FENCE_ENV, run_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut byte)
            .unwrap();
        child
    }

    /// Each request gets its own result, with the state at its time.
    #[tokio::test]
    async fn many_ask_at_once_and_each_hears_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let dirs: Vec<_> = (0..16).map(|n| dir.path().join(n.to_string())).collect();
        for _ in 0..4 {
            let mut asked = tokio::task::JoinSet::new();
            for dir in dirs.clone() {
                asked.spawn(async move {
                    let mut child = marked(&dir);
                    let found = members(placement(&dir)).await;
                    child.kill().unwrap();
                    child.wait().unwrap();
                    let pids: Vec<_> = found.unwrap().iter().map(|stat| stat.pid).collect();
                    assert_eq!(pids, [i32::try_from(child.id()).unwrap()]);
                    assert!(members(placement(&dir)).await.unwrap().is_empty());
                });
            }
            asked.join_all().await;
        }
        assert!(members_now(&placement(&dirs[0])).unwrap().is_empty());
    }
}
