//! Runs backend work on another thread if it may wait for a disk or scans all processes, because all actors share
//! one thread.

use std::sync::Arc;

use tokio::sync::Mutex;

/// The thread of the work has ended: the work panicked, or the daemon stops.
#[derive(Debug, thiserror::Error)]
#[error("the thread that did it is gone: {0}")]
pub(crate) struct ThreadGone(#[from] tokio::task::JoinError);

/// A lock for starting a process, and for checking whether a process was started.
///
/// A spawn continues after its caller is gone. A caller that then looks for the started process waits until the spawn
/// is over, so that a process found missing cannot appear afterwards. Also, any process started at the same time
/// would inherit the sockets meant for one process, so only one process starts at a time.
#[derive(Clone, Debug, Default)]
pub struct Turn(Arc<Mutex<()>>);

impl Turn {
    /// As [`run`], one at a time.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, ThreadGone> {
        let turn = Arc::clone(&self.0).lock_owned().await;
        run(async move {
            let done = work.await;
            drop(turn);
            done
        })
        .await
    }
}

/// Runs the work on a thread that may block. The work runs to its end, even if the caller no longer waits.
pub(crate) async fn run<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, ThreadGone> {
    if crate::platform::ambient::origin().is_some() {
        return Ok(work.await);
    }
    let runtime = tokio::runtime::Handle::current();
    Ok(crate::platform::ambient::blocking(move || runtime.block_on(work)).await?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn who_comes_after_a_spawn_that_nobody_waits_for_sees_what_it_did() {
        let (turn, done) = (Turn::default(), Arc::new(AtomicBool::new(false)));
        let (begun, mut begins) = tokio::sync::oneshot::channel();
        let (set, spawned) = (done.clone(), turn.clone());
        let spawn = tokio::spawn(async move {
            let work = async move {
                let _ = begun.send(());
                #[expect(clippy::disallowed_methods, reason = "the work of another thread")]
                std::thread::sleep(Duration::from_millis(200));
                set.store(true, Ordering::SeqCst);
            };
            spawned.run(work).await
        });
        (&mut begins).await.unwrap();
        spawn.abort();
        let seen = turn.run(async move { done.load(Ordering::SeqCst) }).await;
        assert!(seen.unwrap());
    }
}
