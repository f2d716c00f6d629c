//! The target's half of the peer channel.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::{Outcome, PACKETS_PER_TURN, Session, SessionError, wait};
use crate::handover::message::{FailureCode, Item, Mode, PeerMessage, Reply, StateDigest};
use crate::handover::table::{self, ConnectionBuffers};
use crate::handover::{Incoming, MAX_CONNECTIONS};
use crate::provider::{IncomingConnection, IncomingItem, Provider, ProviderError};

/// Maximum time for which an activation waits for data that the source sent before it reported frozen.
const PEER_TIMEOUT_MS: u64 = 2_000;

/// Data received over the peer channel.
#[derive(Debug, Default)]
pub(super) struct Import {
    /// Id of the `PrepareImport` that is answered once the early parts have arrived.
    pub(super) waiting: Option<u32>,
    /// The source's frozen state.
    pub(super) frozen: Option<StateDigest>,
    table: Vec<ConnectionBuffers>,
    sockets: Vec<Option<OwnedFd>>,
}

impl Session {
    /// Handles the available messages of the other workload. Does not wait for more.
    ///
    /// # Errors
    /// As [`Session::on_agent`].
    pub fn on_peer(&mut self, provider: &mut impl Provider) -> Result<Outcome, SessionError> {
        for _ in 0..PACKETS_PER_TURN {
            let Some(peer) = &mut self.peer else {
                break;
            };
            match peer.receive::<PeerMessage>() {
                Ok(incoming) => {
                    if let Err(error) = self.take(incoming, provider) {
                        self.give_up(error)?;
                    }
                }
                Err(error) if error.would_block() => break,
                Err(error) => {
                    let text = format!("receiving from the other workload: {error}");
                    self.give_up(ProviderError::new(FailureCode::Peer, text))?;
                }
            }
        }
        Ok(Outcome::Continue)
    }

    /// Closes the peer channel and answers the request that waits for it, if any.
    fn give_up(&mut self, error: ProviderError) -> Result<(), SessionError> {
        self.peer = None;
        if let Some(id) = self.import.waiting.take() {
            let ProviderError { code, text } = error;
            self.reply(id, &Reply::Failed { code, text }, &[])?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        incoming: Incoming<PeerMessage>,
        provider: &mut impl Provider,
    ) -> Result<(), ProviderError> {
        match incoming.message {
            PeerMessage::Part { items } => {
                if items.len() != incoming.fds.len() {
                    let text = format!(
                        "{} items with {} descriptors",
                        items.len(),
                        incoming.fds.len()
                    );
                    return Err(bad(&text));
                }
                for (item, fd) in items.into_iter().zip(incoming.fds) {
                    self.take_item(item, fd, provider)?;
                }
                Ok(())
            }
            PeerMessage::EndOfEarly => {
                let prefaulted_bytes = provider.early_complete()?;
                if let Some(id) = self.import.waiting.take() {
                    let ready = Reply::ImportReady { prefaulted_bytes };
                    self.reply(id, &ready, &[]).map_err(|error| {
                        ProviderError::new(FailureCode::System, error.to_string())
                    })?;
                }
                Ok(())
            }
            PeerMessage::Frozen { state, connections } => {
                let table = std::mem::take(&mut self.import.table);
                let sockets = std::mem::take(&mut self.import.sockets);
                if table.len() != connections as usize {
                    return Err(bad("some connections are missing"));
                }
                let joined = table
                    .into_iter()
                    .zip(sockets)
                    .map(|(buffers, fd)| fd.map(|fd| IncomingConnection { fd, buffers }))
                    .collect::<Option<Vec<_>>>()
                    .ok_or_else(|| bad("a connection came without its socket"))?;
                provider.import_connections(joined)?;
                self.import.frozen = Some(state);
                Ok(())
            }
            PeerMessage::Resumed => {
                self.import.frozen = None;
                self.import.table.clear();
                self.import.sockets.clear();
                provider.forget_connections();
                Ok(())
            }
        }
    }

    fn take_item(
        &mut self,
        item: Item,
        fd: OwnedFd,
        provider: &mut impl Provider,
    ) -> Result<(), ProviderError> {
        match item {
            Item::Memory { name, len } => provider.import(IncomingItem::Memory { name, len, fd }),
            Item::File { name } => provider.import(IncomingItem::File { name, fd }),
            Item::Listener { name } => provider.import(IncomingItem::Listener { name, fd }),
            Item::ConnectionTable { count, len } => {
                if count as usize > MAX_CONNECTIONS {
                    return Err(bad("more connections than the limit"));
                }
                self.import.table =
                    table::read(fd, count, len).map_err(|error| bad(&error.to_string()))?;
                self.import.sockets = self.import.table.iter().map(|_| None).collect();
                Ok(())
            }
            Item::Connection { index } => match self.import.sockets.get_mut(index as usize) {
                Some(place @ None) => {
                    *place = Some(fd);
                    Ok(())
                }
                _ => Err(bad(
                    "a connection that is not in the table, or is there twice",
                )),
            },
        }
    }

    /// Waits until all data has arrived that the source sent before it reported frozen.
    pub(super) fn await_frozen(
        &mut self,
        provider: &mut impl Provider,
    ) -> Result<(), ProviderError> {
        if self.mode == Mode::Rounds {
            return Ok(());
        }
        let deadline = Instant::now() + Duration::from_millis(PEER_TIMEOUT_MS);
        while self.import.frozen.is_none() {
            let silent =
                || ProviderError::new(FailureCode::Peer, "the other workload did not freeze");
            let peer = self.peer.as_ref().ok_or_else(silent)?;
            let left = deadline
                .saturating_duration_since(Instant::now())
                .as_millis();
            let left = u16::try_from(left).unwrap_or(u16::MAX);
            if left == 0 || !wait(peer.as_fd(), PollFlags::POLLIN, left) {
                return Err(silent());
            }
            self.on_peer(provider)
                .map_err(|error| ProviderError::new(FailureCode::Peer, error.to_string()))?;
        }
        Ok(())
    }
}

fn bad(text: &str) -> ProviderError {
    let text = format!("the other workload sent an invalid state: {text}");
    ProviderError::new(FailureCode::BadRequest, text)
}
