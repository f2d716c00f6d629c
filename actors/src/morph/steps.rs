//! Carrying out the engine's actions: each becomes a request, a journal entry or a backend call,
//! whose result is the next event.

use std::future::Future;
use std::time::Duration;

use actix::prelude::*;
use kmorph_launch::StartMode;
use kmp_proto::fence::FenceOrder;
use kmp_proto::message::{
    CommitReply, CommitStep, Message as Kmp, MorphCommit, MorphNegotiate, MorphPrepare,
    MorphRollback, MorphTransfer, MorphTransferFixed, MorphValidate, NegotiateFixed, RollbackFixed,
    RollbackStatus, Side, StepStatus, TransferMode, TransferOp, Verdict, WorkloadState,
    transfer_flags,
};
use kmp_proto::morph::{Event, FROZEN_STEP_TIMEOUT, Offer};

use super::{MorphSession, STEP_TIMEOUT, api_checks, by_reference};
use crate::clock;
use crate::journal::{Change, record};
use crate::release::Release;
use crate::transport::{Request, RequestError};
use crate::wall_clock;
use crate::watch::{Ping, Watch};

impl MorphSession {
    /// Runs `work` and tells the engine what came of it.
    fn later(
        &mut self,
        ctx: &mut Context<Self>,
        work: impl Future<Output = Option<Event>> + 'static,
    ) {
        ctx.spawn(work.into_actor(self).map(|event, act, ctx| {
            if let Some(event) = event {
                act.tell(event, ctx);
            }
        }));
    }

    fn ask(
        &self,
        side: Side,
        message: Kmp,
        timeout: Duration,
    ) -> impl Future<Output = Result<Kmp, RequestError>> + 'static + use<> {
        let (transport, key) = (self.services.transport.clone(), self.key(side));
        let request = Request {
            key,
            message,
            timeout,
        };
        async move { transport.ask(request).await }
    }

    /// Asks, waiting for the control channel to come up first: the new kernel's is connected only
    /// after its first heartbeat may have been answered.
    fn ask_patiently(
        &self,
        side: Side,
        message: Kmp,
        timeout: Duration,
    ) -> impl Future<Output = Result<Kmp, RequestError>> + 'static + use<> {
        let (transport, key) = (self.services.transport.clone(), self.key(side));
        async move {
            let deadline = tokio::time::Instant::now() + timeout;
            loop {
                let request = Request {
                    key: key.clone(),
                    message: message.clone(),
                    timeout,
                };
                let result = transport.ask(request).await;
                let again = matches!(result, Err(RequestError::NotConnected));
                if !again || tokio::time::Instant::now() >= deadline {
                    return result;
                }
                tokio::time::sleep(CONTROL_POLL).await;
            }
        }
    }

    pub(super) fn spawn_new(&mut self, ctx: &mut Context<Self>) {
        let services = self.services.within(self.plan.session);
        let (row, instance) = (self.plan.new.clone(), self.plan.instance.clone());
        let start = StartMode::AwaitState {
            session: self.plan.session,
        };
        let by_reference = by_reference(&self.services);
        let predecessor = self.plan.old.placement.clone().filter(|_| by_reference);
        let work = async move { services.spawn(row, &instance, start, predecessor).await };
        ctx.spawn(work.into_actor(self).map(|result, act, ctx| match result {
            Ok(row) => {
                act.plan.new = row;
                act.watch_new(ctx);
            }
            Err(error) => {
                act.tell(Event::RollbackRequested(error.message), ctx);
            }
        }));
    }

    pub(super) fn watch_new(&mut self, ctx: &mut Context<Self>) {
        let Some(placement) = self.plan.new.placement.clone() else {
            return;
        };
        let config = crate::instance::detector_config(&self.services, &self.plan.instance);
        let owner = ctx.address().recipient();
        self.watch = Some(Watch::begin(
            self.services.clone(),
            placement,
            self.plan.new.boot_id,
            config,
            owner,
        ));
    }

    pub(super) fn prepare(&mut self, side: Side, ctx: &mut Context<Self>) {
        let micros = u32::try_from(self.plan.budget.as_micros()).unwrap_or(u32::MAX);
        let millis = u32::try_from(self.plan.phase_timeout.as_millis()).unwrap_or(u32::MAX);
        let message = Kmp::MorphPrepare(MorphPrepare {
            session: self.plan.session,
            from_generation: self.plan.old.generation,
            to_generation: self.plan.new.generation,
            downtime_budget_us: micros,
            phase_timeout_ms: millis,
            side,
        });
        let reply = self.ask_patiently(side, message, STEP_TIMEOUT);
        self.later(ctx, async move {
            Some(match reply.await {
                Ok(Kmp::MorphPrepareReply(_)) => Event::Prepared(side),
                other => refused(side, other),
            })
        });
    }

    pub(super) fn negotiate(&mut self, side: Side, ctx: &mut Context<Self>) {
        let message = Kmp::MorphNegotiate(MorphNegotiate {
            fixed: NegotiateFixed {
                session: self.plan.session,
                memory_bytes: 0,
                dirty_bytes_per_s: 0,
                state_kinds: 0,
                providers: 0,
                modes: 0,
                state_version: 0,
                verdict: Verdict::Offer,
            },
            missing: Vec::new(),
        });
        let (reply, asked) = (self.ask(side, message, STEP_TIMEOUT), clock::now());
        ctx.spawn(reply.into_actor(self).map(move |reply, act, ctx| {
            let event = match reply {
                Ok(Kmp::MorphNegotiateReply(answer)) => {
                    if side == Side::Old {
                        act.status.state_bytes = answer.fixed.memory_bytes;
                    }
                    Event::Offered(side, offer(answer, clock::now() - asked))
                }
                other => refused(side, other),
            };
            act.tell(event, ctx);
        }));
    }

    pub(super) fn round(
        &mut self,
        mode: TransferMode,
        number: u32,
        last: bool,
        ctx: &mut Context<Self>,
    ) {
        let flags = if last { transfer_flags::FINAL } else { 0 };
        let fixed = MorphTransferFixed {
            session: self.plan.session,
            offset: 0,
            total_bytes: self.status.state_bytes,
            dirty_bytes: 0,
            round: number,
            flags,
            chunk_crc32: 0,
            op: TransferOp::Pull,
            mode,
        };
        if mode == TransferMode::Rounds {
            return self.relay_round(fixed, last, ctx);
        }
        // By reference the new side fetches what it maps from the old one directly. Nothing is left to move in the
        // last round: with it the old side learns that the commit record may exist from now on.
        let side = if last { Side::Old } else { Side::New };
        let message = Kmp::MorphTransfer(MorphTransfer {
            fixed,
            data: Vec::new(),
            references: Vec::new(),
        });
        let timeout = if last {
            FROZEN_STEP_TIMEOUT
        } else {
            self.plan.phase_timeout
        };
        let (reply, began) = (self.ask(side, message, timeout), clock::now());
        self.later_round(side, reply, began, last, ctx);
    }

    fn later_round(
        &mut self,
        side: Side,
        reply: impl Future<Output = Result<Kmp, RequestError>> + 'static,
        began: kmp_proto::time::Instant,
        last: bool,
        ctx: &mut Context<Self>,
    ) {
        ctx.spawn(reply.into_actor(self).map(move |reply, act, ctx| {
            let event = match reply {
                Ok(Kmp::MorphTransferReply(applied)) => Event::RoundApplied {
                    sent_bytes: 0,
                    dirty_bytes: applied.fixed.dirty_bytes,
                    took: clock::now() - began,
                },
                other => refused(side, other),
            };
            act.round_over(event, last, ctx);
        }));
    }

    /// A round has come to its end. Prepared means: the first state is over. Without a validation
    /// asked for, wait here.
    pub(super) fn round_over(&mut self, event: Event, last: bool, ctx: &mut Context<Self>) {
        if self.hold_validation && !last && matches!(event, Event::RoundApplied { .. }) {
            self.held_round = Some(event);
            self.status.expires_at = Some(wall_clock::rfc3339_in(self.plan.expiry));
            self.say("morph: prepared");
            self.succeed_operation();
            return self.tell(Event::Held, ctx);
        }
        self.tell(event, ctx);
    }

    pub(super) fn validate(&mut self, ctx: &mut Context<Self>) {
        let message = Kmp::MorphValidate(MorphValidate {
            session: self.plan.session,
            round: self.status.rounds,
            flags: 0,
            state_bytes: self.status.state_bytes,
        });
        let reply = self.ask(Side::New, message, self.plan.phase_timeout);
        ctx.spawn(reply.into_actor(self).map(|reply, act, ctx| {
            let event = match reply {
                Ok(Kmp::MorphValidateReply(report)) => {
                    act.status.checks = api_checks(&report.checks);
                    Event::Report(report.checks)
                }
                other => refused(Side::New, other),
            };
            act.tell(event, ctx);
        }));
    }

    /// One step of the commit: `done` makes an event of a reply whose nonce came back.
    fn step(
        &mut self,
        side: Side,
        step: CommitStep,
        ctx: &mut Context<Self>,
        done: fn(CommitReply) -> Event,
    ) {
        let nonce = getrandom::u64().unwrap_or(self.plan.session);
        let session = self.plan.session;
        let message = Kmp::MorphCommit(MorphCommit {
            session,
            nonce,
            step,
            flags: 0,
        });
        let reply = self.ask(side, message, FROZEN_STEP_TIMEOUT);
        self.later(ctx, async move {
            Some(match reply.await {
                Ok(Kmp::MorphCommitReply(reply))
                    if reply.nonce == nonce
                        && reply.step == step
                        && reply.status == StepStatus::Done =>
                {
                    done(reply)
                }
                other => refused(side, other),
            })
        });
    }

    pub(super) fn freeze(&mut self, ctx: &mut Context<Self>) {
        self.step(Side::Old, CommitStep::Freeze, ctx, |r| {
            Event::Frozen(r.state_digest)
        });
    }

    pub(super) fn activate(&mut self, ctx: &mut Context<Self>) {
        self.step(Side::New, CommitStep::Activate, ctx, |r| {
            Event::Activated(r.state_digest)
        });
    }

    pub(super) fn serve(&mut self, ctx: &mut Context<Self>) {
        if self.times.freeze.is_some() {
            return self.step(Side::New, CommitStep::Serve, ctx, |_| Event::Serving);
        }
        // After a restart of the daemon the connections are not up yet.
        let (session, nonce) = (self.plan.session, getrandom::u64().unwrap_or(1));
        let step = CommitStep::Serve;
        let message = Kmp::MorphCommit(MorphCommit {
            session,
            nonce,
            step,
            flags: 0,
        });
        let reply = self.ask_patiently(Side::New, message, STEP_TIMEOUT);
        self.later(ctx, async move {
            Some(match reply.await {
                Ok(Kmp::MorphCommitReply(reply)) if reply.status == StepStatus::Done => {
                    Event::Serving
                }
                other => refused(Side::New, other),
            })
        });
    }

    pub(super) fn retire(&mut self, ctx: &mut Context<Self>) {
        self.step(Side::Old, CommitStep::Retire, ctx, |_| Event::Retired);
    }

    pub(super) fn write_commit_record(&mut self, ctx: &mut Context<Self>) {
        let mut instance = self.plan.instance.clone();
        instance.active_generation = self.plan.new.generation;
        instance.spec.kernel = self.plan.kernel.clone();
        instance.morphs += 1;
        let mut row = self.row("committing");
        row.committed = true;
        let changes = vec![
            Change::Instance(Box::new(instance.clone())),
            Change::Morph(Box::new(row)),
        ];
        let journal = self.services.journal.clone();
        let work = async move { record(&journal, changes).await };
        ctx.spawn(
            work.into_actor(self)
                .map(move |written, act, ctx| match written {
                    Ok(()) => {
                        act.committed = true;
                        act.plan.instance = instance;
                        act.tell(Event::RecordDurable, ctx);
                    }
                    Err(error) => act.tell(Event::RecordFailed(error.to_string()), ctx),
                }),
        );
    }

    pub(super) fn fence(&mut self, side: Side, order: FenceOrder, ctx: &mut Context<Self>) {
        let services = self.services.within(self.plan.session);
        let mut row = match side {
            Side::Old => self.plan.old.clone(),
            Side::New => self.plan.new.clone(),
        };
        let work = async move {
            let certificate = services.fence(&mut row, order).await?;
            let released = services.release(&row, &certificate).await?;
            Ok::<_, String>((certificate, released))
        };
        ctx.spawn(work.into_actor(self).map(move |done, act, ctx| {
            let event = match done {
                Ok((certificate, released)) => {
                    // It runs no more, so the morph goes on; its operation ends when all is given back.
                    if let Release::Kept(kept) = released {
                        act.kept.push(kept);
                    }
                    Event::Fenced(side, certificate)
                }
                Err(reason) => Event::FenceUnconfirmed(side, reason),
            };
            act.tell(event, ctx);
        }));
    }

    pub(super) fn resume_old(&mut self, ctx: &mut Context<Self>) {
        let message = Kmp::MorphRollback(MorphRollback {
            fixed: RollbackFixed {
                session: self.plan.session,
                side: Side::Old,
            },
            text: self.status.reason.clone().unwrap_or_default(),
        });
        let reply = self.ask_patiently(Side::Old, message, STEP_TIMEOUT);
        let watch = self.old_watch.clone();
        self.later(ctx, async move {
            let event = match reply.await {
                Ok(Kmp::MorphRollbackReply(reply)) if reply.status == RollbackStatus::Running => {
                    Event::OldRunning
                }
                other => refused(Side::Old, other),
            };
            // Whatever it makes of the session: a kernel that serves is left to serve.
            let refused = matches!(event, Event::Refused(..));
            let serves = refused && serves(watch).await;
            Some(if serves { Event::OldRunning } else { event })
        });
    }
}

/// Pause between looks whether the control channel is up.
const CONTROL_POLL: Duration = Duration::from_millis(5);

/// What an answer means that is not the one asked for. Only what the side itself said is a refusal.
fn refused(side: Side, reply: Result<Kmp, RequestError>) -> Event {
    match reply {
        Ok(message) => {
            let text = format!("an unexpected answer: {}", message.msg_type());
            Event::Refused(side, text)
        }
        Err(error @ RequestError::Refused(_)) => Event::Refused(side, error.to_string()),
        Err(error) => Event::Unanswered(side, error.to_string()),
    }
}

/// Whether the workload of a watched generation serves, as its agent says now.
async fn serves(watch: Option<Addr<Watch>>) -> bool {
    let Some(watch) = watch else { return false };
    let answer = watch.send(Ping(FROZEN_STEP_TIMEOUT)).await;
    answer.ok().flatten().is_some_and(|(_, answer)| {
        matches!(
            answer.fixed.workload,
            WorkloadState::Running | WorkloadState::None
        )
    })
}

fn offer(answer: MorphNegotiate, round_trip: Duration) -> Offer {
    Offer {
        round_trip,
        capabilities: answer.capabilities(),
        state_version: answer.fixed.state_version,
        state_bytes: answer.fixed.memory_bytes,
        dirty_bytes_per_s: answer.fixed.dirty_bytes_per_s,
        missing: answer.missing,
    }
}
