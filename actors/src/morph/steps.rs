//! Carries out the engine's actions: each action becomes a request, a journal entry or a backend call, and its result
//! is the next event.

use std::future::Future;
use std::time::Duration;

use actix::prelude::*;
use kmorph_launch::StartMode;
use kmp_proto::fence::{FenceCertificate, FenceOrder};
use kmp_proto::message::{
    CommitReply, CommitStep, Message as Kmp, MorphCommit, MorphNegotiate, MorphPrepare,
    MorphRollback, MorphTransfer, MorphTransferFixed, MorphValidate, Reference, RollbackFixed,
    RollbackStatus, Side, StateProvider, StepStatus, TransferMode, TransferOp, WorkloadState,
    transfer_flags,
};
use kmp_proto::morph::{CommitOrder, CommitRecord, Event, FROZEN_STEP_TIMEOUT, Offer};

use super::provider::PREFERENCE;
use super::{MorphSession, STEP_TIMEOUT, Start, api_checks, by_reference};
use crate::generation::release::Release;
use crate::model::generation::AnyGeneration;
use crate::platform::ambient;
use crate::platform::clock;
use crate::platform::journal::{Change, Proposal, Propose, record_commit};
use crate::platform::transport::{Request, RequestError};
use crate::watch::{Ping, Watch, detector_config};

impl MorphSession {
    /// Runs `work` and passes the result to the engine.
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
        let (transport, key) = (self.means.platform.transport.clone(), self.key(side));
        let request = Request {
            key,
            message,
            timeout,
        };
        async move { transport.ask(request).await }
    }

    /// Waits until the control channel is up, then sends a request. The daemon may connect the target kernel's control
    /// channel only after the first heartbeat answer.
    fn ask_patiently(
        &self,
        side: Side,
        message: Kmp,
        timeout: Duration,
    ) -> impl Future<Output = Result<Kmp, RequestError>> + 'static + use<> {
        let (transport, key) = (self.means.platform.transport.clone(), self.key(side));
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

    pub(super) fn spawn_target(&mut self, ctx: &mut Context<Self>) {
        let generations = self.means.generations.within(self.plan.session);
        let AnyGeneration::Intended(target) = self.plan.target.clone() else {
            let text = "its target was started before".to_owned();
            return self.tell(Event::NotStarted(text), ctx);
        };
        let instance = self.plan.instance.clone();
        let start = StartMode::AwaitState {
            session: self.plan.session,
        };
        let by_reference = by_reference(&self.means);
        let predecessor = self
            .plan
            .source
            .placement()
            .filter(|_| by_reference)
            .cloned();
        self.start = Start::UnderWay(None);
        let work = async move {
            generations
                .spawn(target, &instance, start, predecessor)
                .await
        };
        ctx.spawn(work.into_actor(self).map(|result, act, ctx| {
            let order = match std::mem::replace(&mut act.start, Start::Over) {
                Start::UnderWay(order) => order,
                Start::Over => None,
            };
            match result {
                Ok(placed) => {
                    act.plan.target = placed.into();
                    if order.is_none() {
                        act.watch_target(ctx);
                    }
                }
                Err(error) => act.tell(Event::NotStarted(error.message), ctx),
            }
            if let Some(order) = order {
                act.fence(Side::Target, order, ctx);
            }
        }));
    }

    pub(super) fn watch_target(&mut self, ctx: &mut Context<Self>) {
        let Some(placement) = self.plan.target.placement().cloned() else {
            return;
        };
        let config = detector_config(&self.means.platform.settings.borrow(), &self.plan.instance);
        let owner = ctx.address().recipient();
        self.watch = Some(Watch::begin(
            self.means.platform.clone(),
            self.means.generations.machine.clone(),
            placement,
            self.plan.target.boot_id,
            config,
            owner,
        ));
    }

    pub(super) fn prepare(&mut self, side: Side, ctx: &mut Context<Self>) {
        let micros = u32::try_from(self.plan.budget.as_micros()).unwrap_or(u32::MAX);
        let millis = u32::try_from(self.plan.phase_timeout.as_millis()).unwrap_or(u32::MAX);
        let message = Kmp::MorphPrepare(MorphPrepare {
            session: self.plan.session,
            from_generation: self.plan.source.generation,
            to_generation: self.plan.target.generation,
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
            session: self.plan.session,
            providers: StateProvider::set(PREFERENCE),
        });
        let (reply, asked) = (self.ask(side, message, STEP_TIMEOUT), clock::now());
        self.later(ctx, async move {
            Some(match reply.await {
                Ok(Kmp::MorphNegotiateReply(answer)) => {
                    let offer = Offer {
                        providers: answer.offers,
                        round_trip: clock::now() - asked,
                    };
                    Event::Offered(side, offer)
                }
                other => refused(side, other),
            })
        });
    }

    pub(super) fn round(
        &mut self,
        (provider, mode): (StateProvider, TransferMode),
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
            provider,
        };
        if mode == TransferMode::Rounds {
            return self.relay_round(fixed, last, ctx);
        }
        let timeout = if last {
            FROZEN_STEP_TIMEOUT
        } else {
            self.plan.phase_timeout
        };
        // First the source prepares its state and names the memory that the target is to map. In the last round no
        // state is left to transfer: the request tells the source that the commit record may exist from now on.
        let source = self.ask(Side::Source, pull(fixed, Vec::new()), timeout);
        let (transport, target) = (
            self.means.platform.transport.clone(),
            self.key(Side::Target),
        );
        let began = clock::now();
        self.later(ctx, async move {
            let (mut side, mut reply) = (Side::Source, source.await);
            if let (false, Ok(Kmp::MorphTransferReply(ready))) = (last, &mut reply) {
                let request = Request {
                    key: target,
                    message: pull(fixed, std::mem::take(&mut ready.references)),
                    timeout,
                };
                (side, reply) = (Side::Target, transport.ask(request).await);
            }
            Some(match reply {
                Ok(Kmp::MorphTransferReply(applied)) => Event::RoundApplied {
                    sent_bytes: 0,
                    dirty_bytes: applied.fixed.dirty_bytes,
                    took: clock::now() - began,
                },
                other => refused(side, other),
            })
        });
    }

    pub(super) fn validate(&mut self, ctx: &mut Context<Self>) {
        let message = Kmp::MorphValidate(MorphValidate {
            session: self.plan.session,
            round: self.status.rounds,
            flags: 0,
            state_bytes: self.status.state_bytes,
        });
        let reply = self.ask(Side::Target, message, self.plan.phase_timeout);
        ctx.spawn(reply.into_actor(self).map(|reply, act, ctx| {
            let event = match reply {
                Ok(Kmp::MorphValidateReply(report)) => {
                    act.status.checks = api_checks(&report.checks);
                    Event::Report(report.checks)
                }
                other => refused(Side::Target, other),
            };
            act.tell(event, ctx);
        }));
    }

    /// Performs one step of the commit: `done` turns a reply with the right nonce into an event.
    fn step(
        &mut self,
        side: Side,
        step: CommitStep,
        ctx: &mut Context<Self>,
        done: fn(CommitReply) -> Event,
    ) {
        let nonce = ambient::random().unwrap_or(self.plan.session);
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
        self.step(Side::Source, CommitStep::Freeze, ctx, |r| {
            Event::Frozen(r.state_digest)
        });
    }

    pub(super) fn activate(&mut self, ctx: &mut Context<Self>) {
        self.step(Side::Target, CommitStep::Activate, ctx, |r| {
            Event::Activated(r.state_digest)
        });
    }

    /// Sends SERVE; the caller must have the commit record.
    pub(super) fn serve(&mut self, _: &CommitRecord, ctx: &mut Context<Self>) {
        if self.times.freeze.is_some() {
            return self.step(Side::Target, CommitStep::Serve, ctx, |_| Event::Serving);
        }
        // After a restart of the daemon, the connections are not up yet.
        let (session, nonce) = (self.plan.session, ambient::random().unwrap_or(1));
        let step = CommitStep::Serve;
        let message = Kmp::MorphCommit(MorphCommit {
            session,
            nonce,
            step,
            flags: 0,
        });
        let reply = self.ask_patiently(Side::Target, message, STEP_TIMEOUT);
        self.later(ctx, async move {
            Some(match reply.await {
                Ok(Kmp::MorphCommitReply(reply)) if reply.status == StepStatus::Done => {
                    Event::Serving
                }
                other => refused(Side::Target, other),
            })
        });
    }

    pub(super) fn retire(&mut self, ctx: &mut Context<Self>) {
        self.step(Side::Source, CommitStep::Retire, ctx, |_| Event::Retired);
    }

    /// Writes the rows of the instance and of the morph in one transaction: the point of no return.
    pub(super) fn write_commit_record(&mut self, order: CommitOrder, ctx: &mut Context<Self>) {
        let mut row = self.row();
        row.committed = true;
        let propose = Propose {
            proposal: Proposal::Committed {
                generation: self.plan.target.generation,
                kernel: Box::new(self.plan.kernel.clone()),
            },
            with: vec![Change::Morph(Box::new(row))],
        };
        let rows = self.owner.rows.clone();
        self.later(ctx, async move {
            Some(match record_commit(&rows, order, propose).await {
                Ok(record) => Event::RecordDurable(record),
                Err(error) => Event::RecordFailed(error.to_string()),
            })
        });
    }

    /// Fences a side. If the target is still starting, the fence waits for the start: the backend cannot confirm the
    /// end of a target that does not exist yet.
    pub(super) fn fence(&mut self, side: Side, order: FenceOrder, ctx: &mut Context<Self>) {
        if let (Side::Target, Start::UnderWay(waiting)) = (side, &mut self.start) {
            *waiting = Some(order);
            return;
        }
        let generations = self.means.generations.within(self.plan.session);
        let generation = match side {
            Side::Source => self.plan.source.clone(),
            Side::Target => self.plan.target.clone(),
        };
        let work = async move {
            let fenced = generations.fence(generation, order).await;
            let fenced = fenced.map_err(|not_fenced| not_fenced.reason)?;
            let certificate = fenced.certificate().clone();
            let released = generations.release(fenced).await?;
            Ok::<_, String>((certificate, released))
        };
        ctx.spawn(work.into_actor(self).map(move |done, act, ctx| {
            let event = match done {
                Ok((certificate, released)) => {
                    // The side is fenced, so the morph continues; its operation ends once the resources are released.
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

    /// Resumes the source; the caller must have the certificate of the target's fence.
    pub(super) fn resume_source(&mut self, _: &FenceCertificate, ctx: &mut Context<Self>) {
        let message = Kmp::MorphRollback(MorphRollback {
            fixed: RollbackFixed {
                session: self.plan.session,
                side: Side::Source,
            },
            text: self.status.reason.clone().unwrap_or_default(),
        });
        let reply = self.ask_patiently(Side::Source, message, STEP_TIMEOUT);
        let watch = self.source_watch.clone();
        self.later(ctx, async move {
            let event = match reply.await {
                Ok(Kmp::MorphRollbackReply(reply)) if reply.status == RollbackStatus::Running => {
                    Event::SourceRunning
                }
                other => refused(Side::Source, other),
            };
            // The side refused the session, but if its workload serves, it stays up.
            let refused = matches!(event, Event::Refused(..));
            let serves = refused && serves(watch).await;
            Some(if serves { Event::SourceRunning } else { event })
        });
    }
}

/// Polling interval while the control channel is not up.
const CONTROL_POLL: Duration = Duration::from_millis(5);

/// Returns the event for an unexpected answer. Only the side itself can refuse: by its answer, or by features that it
/// lacks.
fn refused(side: Side, reply: Result<Kmp, RequestError>) -> Event {
    match reply {
        Ok(message) => {
            let text = format!("an unexpected answer: {}", message.msg_type());
            Event::Refused(side, text)
        }
        Err(error @ (RequestError::Refused(_) | RequestError::NoFeature(_))) => {
            Event::Refused(side, error.to_string())
        }
        Err(error) => Event::Unanswered(side, error.to_string()),
    }
}

/// Returns whether the workload of a watched generation serves now, according to its agent.
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

/// Returns a pull by reference, with the references from the source.
fn pull(fixed: MorphTransferFixed, references: Vec<Reference>) -> Kmp {
    Kmp::MorphTransfer(MorphTransfer {
        fixed,
        data: Vec::new(),
        references,
    })
}
