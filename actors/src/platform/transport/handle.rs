//! The other actors' access to the Transport, which may be replaced.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use kmp_proto::message::Message as Kmp;
use kmp_transport::link::Network;
use slog::Logger;
use tokio::time::Instant;

use super::{Request, RequestError, Transport};
use crate::platform::ambient;

/// Maximum wait before a request that was answered RETRY is sent again.
pub const RETRY_MAX: Duration = Duration::from_secs(30);

/// The current Transport: the supervisor replaces one that panicked. Stays on its thread.
#[derive(Clone)]
pub struct TransportHandle {
    network: Arc<dyn Network>,
    current: Rc<RefCell<(u64, Addr<Transport>)>>,
    attachments: Rc<Cell<u64>>,
}

/// Identifies an attachment to a generation: a watch detaches only its own attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachmentId(u64);

impl TransportHandle {
    /// Starts the first Transport.
    pub fn start(log: &Logger, network: Arc<dyn Network>) -> Self {
        let first = Transport::new(log.clone(), Arc::clone(&network)).start();
        Self {
            network,
            current: Rc::new(RefCell::new((1, first))),
            attachments: Rc::default(),
        }
    }

    /// Returns the network, for channels that do not use the actor.
    pub fn network(&self) -> &dyn Network {
        &*self.network
    }

    /// Returns a new, unique id of an attachment.
    pub fn new_attachment(&self) -> AttachmentId {
        self.attachments.set(self.attachments.get() + 1);
        AttachmentId(self.attachments.get())
    }

    /// Returns the number of the current actor: a replaced actor loses its peers.
    pub fn incarnation(&self) -> u64 {
        self.current.borrow().0
    }

    /// Returns the current actor.
    pub fn address(&self) -> Addr<Transport> {
        self.current.borrow().1.clone()
    }

    /// Sends a request, and repeats it while the answer is RETRY, until its timeout.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub async fn ask(&self, request: Request) -> Result<Kmp, RequestError> {
        let Request {
            key,
            message,
            timeout,
        } = request;
        let deadline = Instant::now() + timeout;
        for retries in 1.. {
            let again = Request {
                key: key.clone(),
                message: message.clone(),
                timeout: deadline.saturating_duration_since(Instant::now()),
            };
            let sent = self.address().send(again).await;
            let after = match sent.unwrap_or(Err(RequestError::NotConnected)) {
                Err(RequestError::Retry(after)) => after,
                Err(RequestError::TimedOut(_)) => break,
                answered => return answered,
            };
            let wait = retry_wait(after, retries, ambient::random().unwrap_or(0));
            if Instant::now() + wait >= deadline {
                break;
            }
            tokio::time::sleep(wait).await;
        }
        Err(RequestError::TimedOut(timeout))
    }

    /// Starts a new actor if the current one has panicked. Returns whether it did.
    pub fn replace_if_gone(&self, log: &Logger) -> bool {
        let mut current = self.current.borrow_mut();
        if current.1.connected() {
            return false;
        }
        let next = Transport::new(log.clone(), Arc::clone(&self.network));
        *current = (current.0 + 1, next.start());
        true
    }
}

/// Returns the wait after the `retries`-th consecutive RETRY (docs/kmp.md): the requested time, plus a random
/// part of it that doubles each time, at most [`RETRY_MAX`].
pub(super) fn retry_wait(after: Duration, retries: u32, random: u64) -> Duration {
    let most = after.saturating_mul(1u32.checked_shl(retries - 1).unwrap_or(u32::MAX));
    let part = u32::try_from(random % 1024).unwrap_or(0);
    let spread = most.min(RETRY_MAX) * part / 1024;
    after.saturating_add(spread).min(RETRY_MAX)
}
