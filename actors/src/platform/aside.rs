//! Work of the backend that may wait for a disk, or looks at every process there is: done on another thread, because
//! the one of the actors is everybody's.

use std::sync::Arc;

use tokio::sync::Mutex;

/// The thread of the work is gone: it panicked, or the daemon ends.
#[derive(Debug, thiserror::Error)]
#[error("the thread that did it is gone: {0}")]
pub(crate) struct ThreadGone(#[from] tokio::task::JoinError);

/// Whose turn it is to start a process, or to look whether one was started.
///
/// A spawn goes on when whoever asked for it is gone meanwhile. Who then looks for what it has started waits until it
/// is done: what is found to be missing must not appear afterwards. And sockets that a process is to inherit can be
/// inherited by any that is started at the same moment, so that only one is.
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

/// Does the work on a thread where it may block. It is done to its end, also when nobody waits for it any more.
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
