//! Rounds: state on its way from the old kernel to the new one, chunk by chunk.
//!
//! ```text
//!  old ══ bulk ══▶ [one chunk] ══ bulk ══▶ new
//! ```
//!
//! Invariant: at most one chunk is held here. What the new side does not take is not read from the
//! old one, whose own socket then fills: back-pressure from end to end.

use std::time::Duration;

use actix::prelude::*;
use kmp_proto::message::{
    Message as Kmp, MorphTransfer, MorphTransferFixed, Side, TransferMode, TransferOp,
};
use kmp_proto::morph::{Event, FROZEN_STEP_TIMEOUT};
use kmp_transport::connection::{Connection, ConnectionError};
use kmp_transport::link::Address;
use kmp_transport::peer::{BulkError, open_bulk};

use super::MorphSession;
use crate::clock;
use crate::journal::GenerationRow;
use crate::services::Services;

/// The bulk channels of a session, kept from round to round.
pub(super) struct Relay {
    old: Connection,
    new: Connection,
}

/// What one round moved.
struct Moved {
    sent_bytes: u64,
    dirty_bytes: u64,
    total_bytes: u64,
}

/// Whose fault it is that a round did not come through.
struct Broken {
    side: Side,
    why: String,
}

impl MorphSession {
    /// Carries one round from the old side to the new one.
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
        let (held, services) = (self.relay.take(), self.services.clone());
        let (old, new) = (self.plan.old.clone(), self.plan.new.clone());
        let began = clock::now();
        let work = async move {
            let round = carry(held, &services, [&old, &new], fixed);
            match tokio::time::timeout(timeout, round).await {
                Ok(result) => result,
                Err(_) => Err(Broken {
                    side: Side::New,
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
                Err(Broken { side, why }) => Event::Refused(side, crate::guest_text::line(&why)),
            };
            act.round_over(event, last, ctx);
        }));
    }
}

async fn carry(
    held: Option<Relay>,
    services: &Services,
    [old, new]: [&GenerationRow; 2],
    fixed: MorphTransferFixed,
) -> Result<(Relay, Moved), Broken> {
    let mut relay = match held {
        Some(relay) => relay,
        None => Relay {
            old: open(services, old, fixed.session, Side::Old).await?,
            new: open(services, new, fixed.session, Side::New).await?,
        },
    };
    let moved = relay.round(fixed).await?;
    Ok((relay, moved))
}

async fn open(
    services: &Services,
    row: &GenerationRow,
    session: u64,
    side: Side,
) -> Result<Connection, Broken> {
    let broken = |why: String| Broken { side, why };
    let placement = row
        .placement
        .as_ref()
        .ok_or_else(|| broken("it has no place".to_owned()))?;
    let address = Address::from(placement.endpoint.clone());
    let hello = services.hello(&row.instance, row.generation);
    open_bulk(&address, &hello, session)
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
        let sent = self.old.writer.send(&Kmp::MorphTransfer(pull)).await;
        sent.map_err(at(Side::Old))?;
        let mut sent_bytes = 0;
        loop {
            let transfer = self.next_of_old(fixed).await?;
            let (op, dirty_bytes) = (transfer.fixed.op, transfer.fixed.dirty_bytes);
            let total_bytes = transfer.fixed.total_bytes;
            sent_bytes += transfer.data.len() as u64;
            let message = Kmp::MorphTransfer(transfer);
            if let Err(error) = self.new.writer.send(&message).await {
                // It hung up; what it said before tells why.
                return Err(self.refusal_of_new(error).await);
            }
            if op == TransferOp::EndOfRound {
                self.applied().await?;
                return Ok(Moved {
                    sent_bytes,
                    dirty_bytes,
                    total_bytes,
                });
            }
        }
    }

    /// The next chunk or the end of the round.
    async fn next_of_old(&mut self, asked: MorphTransferFixed) -> Result<MorphTransfer, Broken> {
        let frame = self.old.reader.next().await.map_err(at(Side::Old))?;
        let (session, round) = (asked.session, asked.round);
        match frame.message {
            Kmp::MorphTransfer(transfer)
                if transfer.fixed.session == session
                    && transfer.fixed.round == round
                    && transfer.fixed.mode == TransferMode::Rounds
                    && matches!(
                        transfer.fixed.op,
                        TransferOp::Chunk | TransferOp::EndOfRound
                    ) =>
            {
                Ok(transfer)
            }
            other => Err(unexpected(Side::Old, &other)),
        }
    }

    async fn applied(&mut self) -> Result<(), Broken> {
        let frame = self.new.reader.next().await.map_err(at(Side::New))?;
        match frame.message {
            Kmp::MorphTransferReply(reply) if reply.fixed.op == TransferOp::Applied => Ok(()),
            other => Err(unexpected(Side::New, &other)),
        }
    }

    async fn refusal_of_new(&mut self, error: ConnectionError) -> Broken {
        match tokio::time::timeout(LAST_WORDS, self.new.reader.next()).await {
            Ok(Ok(frame)) => unexpected(Side::New, &frame.message),
            _ => at(Side::New)(error),
        }
    }
}

/// How long a side that hung up is listened to.
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
