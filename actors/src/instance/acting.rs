//! Carries out the engine's actions.

use crate::model::{EventKind, Failure, FailureKind, OperationResult};
use actix::prelude::*;
use kmp_proto::instance::{
    Action, EndOrder, Event, PortOrder, RecoveryOrder, Successor, WatchOrder, Wish,
};
use kmp_proto::recovery::Afterwards;
use slog::{error, info};

use super::Instance;
use crate::generation::journal_failure;
use crate::platform::events::Draft;
use crate::platform::fleet::FleetNews;
use crate::platform::journal::{JournalError, Proposal, Propose};
use crate::recovery::{self, Plan, RecoveryJob};

/// The error of an operation that a termination ended.
const TERMINATED: &str = "it was terminated meanwhile";

impl Instance {
    /// Carries out all pending actions of the engine.
    pub(super) fn run(&mut self, ctx: &mut Context<Self>) {
        while let Some(action) = self.engine.poll_action() {
            self.act(action, ctx);
        }
    }

    fn act(&mut self, action: Action, ctx: &mut Context<Self>) {
        match action {
            Action::Watch(order) => self.order_watch(order, ctx),
            Action::Ports(order) => self.order_ports(order, ctx),
            Action::Show => self.show(),
            Action::Save => self.save(ctx),
            Action::Record(wish) => self.record(wish, ctx),
            Action::BackOff(wait) => {
                let text = format!("recovering in {wait:?} (back-off)");
                self.say(EventKind::Recovery, text);
                self.back_off = Some(ctx.run_later(wait, |act, ctx| {
                    act.tell(Event::BackOffOver, ctx);
                }));
            }
            Action::CancelBackOff => {
                if let Some(timer) = self.back_off.take() {
                    ctx.cancel_future(timer);
                }
            }
            Action::Queue => {
                let name = self.row.name.clone();
                self.fleet.news.do_send(FleetNews::RecoveryWanted(name));
            }
            Action::ReturnGrant => self.return_grant(),
            Action::Recover(order) => self.begin_recovery(order, ctx),
            Action::Morph => self.begin_morph(ctx),
            Action::Capture => self.begin_capture(ctx),
            Action::Tell(news) => {
                if let Some(job) = &self.job {
                    job.tell(news, self.generation.generation);
                }
            }
            Action::EndRecovery(end) => self.end_unfinished_recovery(end, ctx),
            Action::SpawnSucceeded => {
                if let Some(operation) = self.waiting.take() {
                    let name = self.row.name.clone();
                    operation.succeed(Some(OperationResult::Running { name }));
                }
            }
            Action::Disappoint => {
                if let Some(operation) = self.waiting.take() {
                    operation.fail(Failure::new(FailureKind::WrongState, TERMINATED), None);
                }
            }
            Action::End(EndOrder::Asked { force }) => self.begin_end(force, ctx),
            Action::End(EndOrder::SpawnFailed(reason)) => self.give_up_spawn(reason, ctx),
            Action::StartOver => {
                let whose = self.job.as_ref().map(|job| job.name());
                self.start_over(whose.unwrap_or("job"), ctx);
            }
            Action::Stop => {
                let name = self.row.name.clone();
                self.fleet.news.do_send(FleetNews::Gone(name));
                ctx.stop();
            }
        }
    }

    fn order_watch(&mut self, order: WatchOrder, ctx: &mut Context<Self>) {
        match order {
            WatchOrder::Begin => self.begin_watch(ctx),
            WatchOrder::Adopt => self.begin_watch_of_adopted(ctx),
            WatchOrder::TakeOver => self.take_watch_over(ctx),
            WatchOrder::End => self.end_watch(),
            WatchOrder::Pause => self.pause_watch(true),
            WatchOrder::Resume => self.pause_watch(false),
        }
    }

    fn order_ports(&mut self, order: PortOrder, ctx: &mut Context<Self>) {
        match order {
            PortOrder::Aim => self
                .services
                .ports()
                .aim(&self.row.name, Some(&self.generation)),
            PortOrder::Hold => self.services.ports().aim(&self.row.name, None),
            PortOrder::HoldForAWhile => {
                self.services.ports().aim(&self.row.name, None);
                self.hold_ports(ctx);
            }
            PortOrder::Close => self.close_unserved_ports(ctx),
        }
    }

    fn show(&self) {
        let name = self.engine.condition().as_str();
        let state = name.replace(' ', "_");
        let text = match self.engine.reason() {
            Some(reason) => format!("{name}: {reason}"),
            None => name.to_owned(),
        };
        info!(self.log, "{}", &text; "generation" => self.generation.generation);
        let generation = self.generation.generation;
        let draft = Draft::of(EventKind::InstanceState, &self.row.name, generation, text);
        self.services
            .platform
            .events
            .publish(draft.with(serde_json::json!({ "state": state })));
    }

    fn record(&mut self, wish: Wish, ctx: &mut Context<Self>) {
        let propose = Propose {
            proposal: Proposal::Wish(wish.desired()),
            with: Vec::new(),
        };
        self.propose(propose, ctx, move |act, written, ctx| match wish {
            Wish::Recover => act.recovery_written(written, ctx),
            Wish::Terminate => act.termination_written(written, ctx),
        });
    }

    fn recovery_written(&mut self, written: Result<(), JournalError>, ctx: &mut Context<Self>) {
        let asked = self.asked.recovery.take();
        match written {
            Ok(()) => {
                if let Some(asked) = asked {
                    let operation = asked.granted();
                    operation.step("recovering");
                    self.waiting = Some(operation);
                }
                self.tell(Event::Recorded(Wish::Recover), ctx);
            }
            Err(error) => {
                self.tell(Event::NotRecorded(Wish::Recover), ctx);
                if let Some(asked) = asked {
                    asked.refused(journal_failure(&error));
                }
            }
        }
    }

    fn begin_recovery(&mut self, order: RecoveryOrder, ctx: &mut Context<Self>) {
        let plan = Plan {
            instance: (*self.row).clone(),
            failed: self.generation.clone(),
            afterwards: match order.successor {
                Successor::None => Afterwards::Quarantine,
                Successor::ByPolicy | Successor::Asked => Afterwards::Respawn,
            },
            cause: order.failure.cause,
            evidence: order.failure.evidence,
            verdict_at: order.decided_at,
        };
        let owner = recovery::Owner {
            news: ctx.address().recipient(),
            rows: ctx.address().recipient(),
        };
        let (means, fleet) = (self.services.of_a_recovery(), self.fleet.clone());
        let job = RecoveryJob::begin(means, fleet, owner, plan);
        self.job = Some(Box::new(job));
    }

    pub(super) fn return_grant(&self) {
        let name = self.row.name.clone();
        self.fleet.news.do_send(FleetNews::RecoveryReturned(name));
    }

    /// Handles a panic of an actor below this one, which loses part of the instance's state. The supervisor creates a
    /// new actor from the journal and the machine, as after a restart of the daemon.
    pub(super) fn start_over(&mut self, whose: &str, ctx: &mut Context<Self>) {
        error!(self.log, "an actor below it panicked: it starts over"; "actor" => whose,
            "generation" => self.generation.generation);
        ctx.stop();
    }
}
