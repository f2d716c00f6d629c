//! Rounds: the relay copies state from the source kernel to the target, one chunk at a time.
//!
//! ```text
//!  source ══ bulk ══▶ [one chunk] ══ bulk ══▶ target
//! ```
//!
//! Invariant: the relay holds at most one chunk. It reads no further chunk from the source until the target takes the
//! last one; then the source's socket fills. This is back-pressure from end to end.

use std::time::Duration;

use actix::prelude::*;
use kmp_proto::message::{
    Expected, IncomingState, Message as Kmp, MorphTransfer, MorphTransferFixed, Side, TransferMode,
    TransferOp,
};
use kmp_proto::morph::{Event, FROZEN_STEP_TIMEOUT};
use kmp_transport::connection::{Connection, ConnectionError};
use kmp_transport::link::Address;
use kmp_transport::peer::{BulkError, next_on_bulk, open_bulk};

use super::Means;
use super::MorphSession;
use crate::model::generation::AnyGeneration;
use crate::platform::clock;

/// The bulk channels of a session, kept from round to round.
pub(super) struct Relay {
    source: Connection,
    target: Connection,
    /// Checks the source's messages against its announcement.
    state: IncomingState,
}

/// Counters of one round.
struct Moved {
    sent_bytes: u64,
    dirty_bytes: u64,
    total_bytes: u64,
}

/// A failed round, and the side that caused it.
struct Broken {
    side: Side,
    why: String,
}

impl MorphSession {
    /// Transfers one round from the source to the target.
    pub(super) fn relay_round(
        &mut self,
        fixed: MorphTransferFixed,
        last: bool,
        ctx: &mut Context<Self>,
    ) {
        let timeout = if last {
            FROZEN_STEP_TIMEOUT
        } else {
            self.plan.phase_timeout
        };
        let (held, means) = (self.relay.take(), self.means.clone());
        let (source, target) = (self.plan.source.clone(), self.plan.target.clone());
        let began = clock::now();
        let work = async move {
            let round = carry(held, &means, [&source, &target], fixed);
            match tokio::time::timeout(timeout, round).await {
                Ok(result) => result,
                Err(_) => Err(Broken {
                    side: Side::Target,
                    why: format!("round {} took longer than {timeout:?}", fixed.round),
                }),
            }
        };
        ctx.spawn(work.into_actor(self).map(move |result, act, ctx| {
            let event = match result {
                Ok((relay, moved)) => {
                    act.relay = Some(relay);
                    act.status.sent_bytes += moved.sent_bytes;
                    act.status.state_bytes = moved.total_bytes;
                    Event::RoundApplied {
                        sent_bytes: moved.sent_bytes,
                        dirty_bytes: moved.dirty_bytes,
                        took: clock::now() - began,
                    }
                }
                Err(Broken { side, why }) => {
                    Event::Refused(side, crate::model::guest_text::line(&why))
                }
            };
            act.tell(event, ctx);
        }));
    }
}

async fn carry(
    held: Option<Relay>,
    means: &Means,
    [source, target]: [&AnyGeneration; 2],
    fixed: MorphTransferFixed,
) -> Result<(Relay, Moved), Broken> {
    let mut relay = match held {
        Some(relay) => relay,
        None => Relay {
            source: open(means, source, fixed.session, Side::Source).await?,
            target: open(means, target, fixed.session, Side::Target).await?,
            state: IncomingState::new(fixed.session, fixed.provider),
        },
    };
    let moved = relay.round(fixed).await?;
    Ok((relay, moved))
}

async fn open(
    means: &Means,
    row: &AnyGeneration,
    session: u64,
    side: Side,
) -> Result<Connection, Broken> {
    let broken = |why: String| Broken { side, why };
    let placement = row
        .placement()
        .ok_or_else(|| broken("it has no place".to_owned()))?;
    let address = Address::from(placement.endpoint.clone());
    let speaker = means.generations.machine.speaker(placement);
    open_bulk(
        means.platform.transport.network(),
        &address,
        speaker,
        session,
    )
    .await
    .map_err(|error: BulkError| broken(format!("opening a bulk channel: {error}")))
}

impl Relay {
    async fn round(&mut self, fixed: MorphTransferFixed) -> Result<Moved, Broken> {
        let pull = MorphTransfer {
            fixed: MorphTransferFixed {
                op: TransferOp::Pull,
                mode: TransferMode::Rounds,
                ..fixed
            },
            data: Vec::new(),
            references: Vec::new(),
        };
        let sent = self.source.writer.send(&Kmp::MorphTransfer(pull)).await;
        sent.map_err(at(Side::Source))?;
        let mut sent_bytes = 0;
        loop {
            let transfer = self.next_of_source(fixed).await?;
            let (op, dirty_bytes) = (transfer.fixed.op, transfer.fixed.dirty_bytes);
            let total_bytes = transfer.fixed.total_bytes;
            sent_bytes += transfer.data.len() as u64;
            let message = Kmp::MorphTransfer(transfer);
            let sequence = match self.target.writer.send(&message).await {
                Ok(sequence) => sequence,
                // The target closed the channel; its last message says why.
                Err(error) => return Err(self.refusal_of_target(error).await),
            };
            if op == TransferOp::EndOfRound {
                self.applied(&message, sequence).await?;
                return Ok(Moved {
                    sent_bytes,
                    dirty_bytes,
                    total_bytes,
                });
            }
        }
    }

    /// Reads the next chunk or the end of the round.
    async fn next_of_source(&mut self, asked: MorphTransferFixed) -> Result<MorphTransfer, Broken> {
        let frame = next_on_bulk(&mut self.source, state)
            .await
            .map_err(at(Side::Source))?;
        let transfer = match frame.message {
            Kmp::MorphTransfer(transfer) => transfer,
            other => return Err(unexpected(Side::Source, &other)),
        };
        let broken = |why: String| Broken {
            side: Side::Source,
            why: format!("its bulk channel: {why}"),
        };
        if transfer.fixed.round != asked.round {
            let (found, expected) = (transfer.fixed.round, asked.round);
            return Err(broken(format!("round {found}, asked was {expected}")));
        }
        let taken = self.state.take(&transfer);
        taken.map_err(|error| broken(error.to_string()))?;
        Ok(transfer)
    }

    /// Waits for the target's answer to the end of the round, which had `sequence`.
    async fn applied(&mut self, end: &Kmp, sequence: u32) -> Result<(), Broken> {
        let frame = next_on_bulk(&mut self.target, |_| false)
            .await
            .map_err(at(Side::Target))?;
        if !frame.message.is_reply() {
            return Err(unexpected(Side::Target, &frame.message));
        }
        if frame.header.sequence != sequence {
            let error = ConnectionError::AnswersNothing {
                msg_type: frame.header.msg_type,
                sequence: frame.header.sequence,
            };
            return Err(at(Side::Target)(error));
        }
        let expected = Expected::of(end);
        let checked = expected.map_or(Ok(()), |expected| expected.check(&frame.message));
        checked.map_err(|error| Broken {
            side: Side::Target,
            why: format!("its bulk channel: {error}"),
        })
    }

    async fn refusal_of_target(&mut self, error: ConnectionError) -> Broken {
        match tokio::time::timeout(LAST_WORDS, self.target.reader.next()).await {
            Ok(Ok(frame)) => unexpected(Side::Target, &frame.message),
            _ => at(Side::Target)(error),
        }
    }
}

/// Returns whether the source sends this message without a request.
fn state(message: &Kmp) -> bool {
    matches!(message, Kmp::MorphTransfer(_))
}

/// How long the relay reads on after a side has closed its channel.
const LAST_WORDS: Duration = Duration::from_millis(100);

fn at(side: Side) -> impl FnOnce(ConnectionError) -> Broken {
    move |error| Broken {
        side,
        why: format!("its bulk channel: {error}"),
    }
}

fn unexpected(side: Side, message: &Kmp) -> Broken {
    let why = match message {
        Kmp::Error(error) => format!("it refused: {}: {}", error.code, error.text),
        other => format!("an unexpected {} on its bulk channel", other.msg_type()),
    };
    Broken { side, why }
}

#[cfg(test)]
mod tests;
