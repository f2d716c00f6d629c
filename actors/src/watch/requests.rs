//! Requests to a watch, from its owner and from status queries.

use std::time::Duration;

use actix::prelude::*;
use kmp_proto::detector::{Config, Counters, Detector, Event};
use kmp_proto::message::HeartbeatRsp;
use tokio::sync::oneshot;

use super::notices::LoadNotices;
use super::{PING_FIRST, Watch, WatchEvent, WatchKind, stuck};
use crate::platform::clock;

/// The figures of a watch.
#[derive(Clone, Debug)]
pub struct WatchFigures {
    /// The detector's phase.
    pub phase: &'static str,
    /// Its configuration.
    pub config: Config,
    /// Its counters.
    pub counters: Counters,
    /// Consecutive probes without an answer.
    pub missed: usize,
    /// Time since the last answer.
    pub since_answer: Option<Duration>,
    /// The last answer.
    pub last: Option<HeartbeatRsp>,
    /// Last round trip.
    pub rtt: Option<Duration>,
    /// Smoothed round trip.
    pub smoothed_rtt: Option<Duration>,
    /// Maximum delay of the daemon's own timers.
    pub self_lag: Duration,
    /// Release of the kernel, as the agent reports it.
    pub kernel_release: String,
}

/// Reads the figures.
#[derive(Debug, Message)]
#[rtype(result = "WatchFigures")]
pub struct GetFigures;

/// Changes the timeout.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Reconfigure(pub Config);

/// Sends a heartbeat now. Returns the round trip and the answer.
#[derive(Debug, Message)]
#[rtype(result = "Option<(Duration, HeartbeatRsp)>")]
pub struct Ping(pub Duration);

/// Tells the watch that the generation is frozen on purpose, or that it runs again.
///
/// While the generation is frozen, the watch sends no probes and ignores its silence. It still reports an exit at
/// once. Afterwards the detector restarts.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Pause(pub bool);

/// Changes the owner.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SetOwner(pub Recipient<WatchEvent>);

/// Ends the watch and its connections.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct EndWatch;

impl Handler<EndWatch> for Watch {
    type Result = ();

    fn handle(&mut self, _: EndWatch, ctx: &mut Self::Context) {
        self.ended = true;
        ctx.stop();
    }
}

impl Handler<GetFigures> for Watch {
    type Result = MessageResult<GetFigures>;

    fn handle(&mut self, _: GetFigures, _: &mut Self::Context) -> Self::Result {
        MessageResult(WatchFigures {
            phase: self.detector.phase(),
            config: self.patience.config(),
            counters: self.detector.counters(),
            missed: self.detector.missed(),
            since_answer: self.last_answer.map(|(at, _)| clock::now() - at),
            last: self.last_answer.map(|(_, answer)| answer),
            rtt: self.rtt,
            smoothed_rtt: self.smoothed_rtt,
            self_lag: self.self_lag,
            kernel_release: self.kernel_release.clone(),
        })
    }
}

impl Handler<Reconfigure> for Watch {
    type Result = ();

    fn handle(&mut self, Reconfigure(config): Reconfigure, ctx: &mut Self::Context) {
        let config = self.patience.reconfigure(config);
        self.tell(Event::Reconfigure(config), ctx);
    }
}

impl Handler<Pause> for Watch {
    type Result = ();

    fn handle(&mut self, Pause(paused): Pause, ctx: &mut Self::Context) {
        if paused == self.paused || self.detector.phase() == "failed" {
            return;
        }
        self.paused = paused;
        if paused {
            self.had_answered |= self.detector.phase() != "starting";
            self.detach();
        } else {
            let mut config = self.patience.config();
            if self.had_answered {
                config = config.already_runs_for(Duration::MAX);
                config.has_served = true;
            }
            self.detector = Detector::new(self.patience.reconfigure(config), clock::now());
            self.sent.clear();
            self.attach(ctx);
        }
        self.schedule(ctx);
    }
}

impl Handler<SetOwner> for Watch {
    type Result = ();

    fn handle(&mut self, SetOwner(owner): SetOwner, _: &mut Self::Context) {
        self.owner = owner;
        // The new owner knows nothing of the load or of the agent's reports yet.
        self.load = LoadNotices::default();
        if let Some(status) = self.said.clone() {
            let status = stuck::on_top(status, self.stuck.as_ref());
            self.tell_owner(WatchKind::Health(status));
        }
        // The morph may have ended before it was told, and a verdict comes once.
        if let Some(verdict) = self.verdict.clone() {
            self.tell_owner(WatchKind::Failed(verdict));
        }
    }
}

impl Handler<Ping> for Watch {
    type Result = ResponseFuture<Option<(Duration, HeartbeatRsp)>>;

    fn handle(&mut self, Ping(timeout): Ping, _: &mut Self::Context) -> Self::Result {
        let probe = self.next_ping;
        self.next_ping = self.next_ping.checked_add(1).unwrap_or(PING_FIRST);
        self.pings.retain(|_, waiting| !waiting.is_closed());
        let (sender, receiver) = oneshot::channel();
        self.pings.insert(probe, sender);
        self.send_probe(probe);
        Box::pin(async move { tokio::time::timeout(timeout, receiver).await.ok()?.ok() })
    }
}
