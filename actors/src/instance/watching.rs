//! The watch of the active generation, and its reports.

use std::time::Duration;

use crate::model::EventKind;
use actix::prelude::*;
use kmp_proto::detector::{Config, Level, Verdict};
use kmp_proto::instance::{Event, Failure};
use kmp_proto::message::{FailureCause, Health, HealthStatus};

use super::Instance;
use crate::platform::journal::{Change, Note};
use crate::platform::{clock, wall_clock};
use crate::watch::{EndWatch, Pause, SetOwner, Watch, WatchEvent, WatchKind, detector_config};

/// The name of an overload in events and as a reason.
const OVERLOADED: &str = "overloaded";

impl Instance {
    pub(super) fn begin_watch(&mut self, ctx: &mut Context<Self>) {
        let config = detector_config(&self.services.platform.settings.borrow(), &self.row);
        self.begin_watch_with(config, ctx);
    }

    pub(super) fn begin_watch_of_adopted(&mut self, ctx: &mut Context<Self>) {
        let age = Duration::from_secs(wall_clock::seconds_since(&self.generation.spawned_at));
        let mut config = detector_config(&self.services.platform.settings.borrow(), &self.row)
            .already_runs_for(age);
        config.has_served = self.served_before;
        self.begin_watch_with(config, ctx);
    }

    fn begin_watch_with(&mut self, config: Config, ctx: &mut Context<Self>) {
        let Some(placement) = self.generation.placement().cloned() else {
            return;
        };
        self.health = None;
        self.answered_until = None;
        self.watch = Some(Watch::begin(
            self.services.platform.clone(),
            self.services.generations.machine.clone(),
            placement,
            self.generation.boot_id,
            config,
            ctx.address().recipient(),
        ));
    }

    /// Takes over the watch of a morph's target, with the agent's reports so far; starts one if the morph had none.
    pub(super) fn take_watch_over(&mut self, ctx: &mut Context<Self>) {
        self.health = None;
        match &self.watch {
            Some(watch) => watch.do_send(SetOwner(ctx.address().recipient())),
            None => self.begin_watch(ctx),
        }
    }

    pub(super) fn end_watch(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.do_send(EndWatch);
        }
    }

    pub(super) fn pause_watch(&self, paused: bool) {
        if let Some(watch) = &self.watch {
            watch.do_send(Pause(paused));
        }
    }
}

impl Handler<WatchEvent> for Instance {
    type Result = ();

    fn handle(&mut self, event: WatchEvent, ctx: &mut Self::Context) {
        let stale = event.generation != self.generation.generation;
        if stale {
            return;
        }
        match event.kind {
            WatchKind::Healthy(release) => self.answered(release, ctx),
            WatchKind::Booted(boot_id) => {
                self.generation.boot_id = Some(boot_id);
                let (name, generation) = (self.row.name.clone(), self.generation.generation);
                let booted = Change::Booted(name, generation, boot_id);
                self.services.platform.journal.do_send(Note(booted));
            }
            WatchKind::Suspect(silence) => {
                self.tell(Event::Silent(format!("silent for {silence:.1?}")), ctx);
            }
            WatchKind::Relieved(silence) => {
                let text = format!("answers again after {silence:.1?}");
                self.say(EventKind::Detector, text);
                self.tell(Event::Answers, ctx);
            }
            WatchKind::Congested => {
                let text = "transport congested: its channel takes no probes";
                self.say(EventKind::Detector, text);
            }
            WatchKind::Health(status) => {
                self.health_said(status, ctx);
                self.check_spawn(ctx);
            }
            WatchKind::Overload(evidence) => self.load_changed(evidence, ctx),
            WatchKind::Failed(verdict) => {
                self.gone = verdict.ended;
                if self.engine.has_served() {
                    self.answered_until = Some((clock::now(), verdict.silence));
                }
                self.failed(verdict, ctx);
            }
            WatchKind::Gone => self.start_over("watch", ctx),
        }
    }
}

impl Instance {
    /// Handles a healthy answer.
    pub(super) fn healthy(&mut self, release: String, ctx: &mut Context<Self>) {
        if !release.is_empty() {
            self.kernel_release = release;
        }
        self.gone = false;
        self.tell(Event::Healthy, ctx);
    }

    fn health_said(&mut self, status: HealthStatus, ctx: &mut Context<Self>) {
        self.note_restarts(&status, ctx);
        self.note_given_up(&status, ctx);
        let unwell = status.fixed.health != Health::Healthy;
        let said = unwell.then(|| status.text.clone());
        self.health = Some(status);
        self.tell(Event::Said(said), ctx);
    }

    /// Shows the load; it never causes a fence or a recovery.
    fn load_changed(&mut self, evidence: Option<String>, ctx: &mut Context<Self>) {
        let load = evidence.map(|evidence| format!("{OVERLOADED}: {evidence}"));
        let text = load.clone();
        let text = text.unwrap_or_else(|| "not overloaded any more".to_owned());
        self.say(EventKind::Detector, text);
        self.tell(Event::Load(load), ctx);
    }

    fn failed(&mut self, verdict: Verdict, ctx: &mut Context<Self>) {
        let mut evidence = verdict.evidence;
        let said = self.health.take().map(|health| health.text);
        if let Some(said) = said.filter(|text| !text.is_empty())
            && verdict.level == Level::WorkloadFailed
        {
            evidence.push(format!("its agent says: {said}"));
        }
        let cause = match verdict.level {
            Level::KernelDead => FailureCause::KernelDead,
            Level::AgentDead => FailureCause::AgentDead,
            Level::WorkloadFailed => FailureCause::WorkloadFailed,
        };
        let failure = Failure { cause, evidence };
        let text = format!("{}: {}", verdict.level.as_str(), failure.text());
        self.say(EventKind::Detector, text);
        self.tell(Event::Failed(failure), ctx);
    }
}
