//! The Watch actor: the failure detector of one generation.
//!
//! The watch sends probes, listens for exit events, measures the daemon's own delay, and reports the detector's
//! findings to its owner. The owner changes at most once, when a morph commits.

mod config;
mod notices;
mod patience;
mod requests;
mod stuck;

use std::collections::BTreeMap;
use std::time::Duration;

use actix::prelude::*;
use kmorph_backends::contract::{ExitCause, Observation, Placement};
use kmp_proto::detector::{Action, Config, Detector, Event, LAG_MIN, Sample, StuckCpus, Verdict};
use kmp_proto::message::{HealthStatus, HeartbeatReq, HeartbeatRsp};
use kmp_proto::time::Instant;
use kmp_transport::kernel::{self, Sign};
use kmp_transport::link::{Address, KMP_PORT};
use slog::{Logger, info, o, warn};
use tokio::sync::oneshot;

pub use self::config::detector_config;
use self::notices::{HEALTH_NOTICES_MAX, HEALTH_WINDOW, HealthNotices, LoadNotices};
pub use self::requests::{EndWatch, GetFigures, Pause, Ping, Reconfigure, SetOwner, WatchFigures};
use crate::generation::machine::Machine;
use crate::model::repeated::Repeated;
use crate::platform::Platform;
use crate::platform::clock;
use crate::platform::transport::{Attach, AttachmentId, Detach, PeerKey, PeerUpdate, SendProbe};
use crate::watch::patience::Patience;

/// Maximum number of probes whose send time is kept for the round trip.
const ROUND_TRIPS_MAX: usize = 32;
/// Prefix of the line in a verdict's evidence that quotes the instance's console. Only the operator may see that line;
/// notices to other instances omit it.
pub const CONSOLE_SAID: &str = "its console says: ";

/// Reports to the owner.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct WatchEvent {
    /// The generation.
    pub generation: u64,
    /// The kind of report.
    pub kind: WatchKind,
}

/// See [`WatchEvent`].
#[derive(Debug)]
pub enum WatchKind {
    /// The first healthy answer, with the kernel's release.
    Healthy(String),
    /// Its first HELLO. The boot id reveals a kernel that restarted.
    Booted(BootId),
    /// Silent for this time.
    Suspect(Duration),
    /// Answered again after this time.
    Relieved(Duration),
    /// The channel accepts no probes.
    Congested,
    /// The generation has failed.
    Failed(Verdict),
    /// The watch panicked: the generation is unmonitored.
    Gone,
    /// The agent reports its health.
    Health(HealthStatus),
    /// The agent's figures show an overload, with the evidence; `None` when it is over.
    Overload(Option<String>),
}

/// The boot id of a kernel's HELLO.
pub type BootId = [u8; 16];

/// The actor.
pub struct Watch {
    platform: Platform,
    machine: Machine,
    log: Logger,
    key: PeerKey,
    placement: Placement,
    owner: Recipient<WatchEvent>,
    detector: Detector,
    patience: Patience,
    timer: Option<SpawnHandle>,
    due: Option<Instant>,
    sent: BTreeMap<u32, Instant>,
    pings: BTreeMap<u32, oneshot::Sender<(Duration, HeartbeatRsp)>>,
    next_ping: u32,
    last_answer: Option<(Instant, HeartbeatRsp)>,
    rtt: Option<Duration>,
    smoothed_rtt: Option<Duration>,
    self_lag: Duration,
    kernel_release: String,
    /// The last health that the agent reported.
    said: Option<HealthStatus>,
    /// The stuck CPUs that the owner knows about.
    stuck: Option<StuckCpus>,
    health: HealthNotices,
    load: LoadNotices,
    /// Failed queries to the backend.
    unseen: Repeated,
    /// Why the peer has rejected the heartbeat channel.
    rejected: Option<String>,
    /// Incarnation of the Transport that the watch is attached to, and the attachment.
    attached: (u64, Option<AttachmentId>),
    /// The generation's boot id, once it has sent HELLO to this daemon or to an earlier one.
    boot: Option<BootId>,
    /// The instance is frozen on purpose: its silence does not count, its exit still does.
    paused: bool,
    /// The instance had answered before the freeze.
    had_answered: bool,
    /// Why the connection failed, if there is none.
    unreachable: Option<String>,
    /// The last sign that the kernel runs, and its time.
    kernel_sign: Option<(Sign, Instant)>,
    /// A query to the kernel is under way.
    asking_kernel: bool,
    /// The verdict, once there is one.
    verdict: Option<Verdict>,
    /// The instance was told to end.
    ended: bool,
}

/// First number of a ping's probes; the detector's own numbers are lower.
const PING_FIRST: u32 = 1 << 31;

impl Watch {
    /// Begins to watch a placed generation.
    pub fn begin(
        platform: Platform,
        machine: Machine,
        placement: Placement,
        boot: Option<BootId>,
        config: Config,
        owner: Recipient<WatchEvent>,
    ) -> Addr<Self> {
        let instance = placement.name.as_str().to_owned();
        let generation = placement.generation;
        let log = platform
            .log
            .new(o!("instance" => instance.clone(), "generation" => generation));
        let watch = Self {
            log,
            key: PeerKey {
                instance,
                generation,
            },
            placement,
            owner,
            detector: Detector::new(config, clock::now()),
            patience: Patience::new(config),
            timer: None,
            due: None,
            sent: BTreeMap::new(),
            pings: BTreeMap::new(),
            next_ping: PING_FIRST,
            last_answer: None,
            rtt: None,
            smoothed_rtt: None,
            self_lag: Duration::ZERO,
            kernel_release: String::new(),
            said: None,
            stuck: None,
            health: HealthNotices::default(),
            load: LoadNotices::default(),
            unseen: Repeated::default(),
            rejected: None,
            attached: (0, None),
            boot,
            paused: false,
            had_answered: false,
            unreachable: None,
            kernel_sign: None,
            asking_kernel: false,
            verdict: None,
            ended: false,
            platform,
            machine,
        };
        watch.start()
    }

    fn tell(&mut self, event: Event, ctx: &mut Context<Self>) {
        if self.paused && !matches!(event, Event::Ended(_) | Event::Reconfigure(_)) {
            return;
        }
        if !self.paused && self.attached.0 != self.platform.transport.incarnation() {
            self.attach(ctx);
            self.detector.handle(Event::ChannelLost, clock::now());
        }
        self.detector.handle(event, clock::now());
        while let Some(action) = self.detector.poll_action() {
            self.act(action, ctx);
        }
        self.schedule(ctx);
    }

    fn act(&mut self, action: Action, ctx: &mut Context<Self>) {
        let kind = match action {
            Action::SendProbe { probe } => return self.send_probe(probe),
            Action::LookCloser => return self.look_closer(ctx),
            Action::Healthy => {
                self.settle();
                WatchKind::Healthy(self.kernel_release.clone())
            }
            Action::Suspect { silence } => {
                self.bear_with_it();
                WatchKind::Suspect(silence)
            }
            Action::Relieved { silence } => {
                self.look_no_closer();
                self.settle();
                WatchKind::Relieved(silence)
            }
            Action::TransportCongested => WatchKind::Congested,
            Action::Failed(mut verdict) => {
                verdict.evidence.extend(self.known());
                self.verdict = Some(verdict.clone());
                WatchKind::Failed(verdict)
            }
        };
        self.tell_owner(kind);
    }

    /// Returns further evidence for a verdict.
    fn known(&mut self) -> Vec<String> {
        let sign = self.kernel_sign.take();
        let sign = sign.map(|(sign, at)| format!("{sign}, {:.1?} before", clock::now() - at));
        let console = self.machine.backend.console_tail(&self.placement);
        let console = console.map(|tail| format!("{CONSOLE_SAID}{tail}"));
        let known = [
            self.patience.evidence(),
            sign,
            self.rejected.take(),
            self.unreachable.take(),
            console,
        ];
        known.into_iter().flatten().collect()
    }

    /// Extends the timeout when silence begins and before a verdict, by the time that the host kept the instance from
    /// running.
    fn bear_with_it(&mut self) {
        if self.detector.phase() == "monitoring" {
            return;
        }
        let threads = self.machine.backend.scheduled(&self.placement);
        if let Some(config) = self.patience.waits(&threads, clock::now()) {
            self.detector
                .handle(Event::Reconfigure(config), clock::now());
        }
    }

    /// Resets the patience and the signs of the kernel after an answer.
    fn settle(&mut self) {
        self.kernel_sign = None;
        if let Some(config) = self.patience.over() {
            self.detector
                .handle(Event::Reconfigure(config), clock::now());
        }
    }

    fn kernel_runs(&mut self, sign: Sign, ctx: &mut Context<Self>) {
        self.kernel_sign = Some((sign, clock::now()));
        self.tell(Event::KernelAnswered, ctx);
    }

    fn tell_owner(&self, kind: WatchKind) {
        self.owner.do_send(WatchEvent {
            generation: self.key.generation,
            kind,
        });
    }

    fn health_said(&mut self, status: HealthStatus, ctx: &mut Context<Self>) {
        self.said = Some(status.clone());
        // The report is newer than the last heartbeat, and the next heartbeat may be seconds away.
        if let Some((_, last)) = &mut self.last_answer {
            (last.fixed.health, last.fixed.workload) = (status.fixed.health, status.fixed.workload);
        }
        if self.health.told == HEALTH_NOTICES_MAX {
            self.health.held = Some(status);
            return;
        }
        if self.health.told == 0 {
            ctx.run_later(HEALTH_WINDOW, |act, ctx| {
                if let Some(status) = std::mem::take(&mut act.health).held {
                    act.health_said(status, ctx);
                }
            });
        }
        self.health.told += 1;
        let status = stuck::on_top(status, self.stuck.as_ref());
        self.tell_owner(WatchKind::Health(status));
    }

    /// Reads the stuck CPUs from an answer and reports them as health.
    fn heed_stall(&mut self, answer: &HeartbeatRsp, ctx: &mut Context<Self>) {
        self.tell(Event::Stall(answer.stall), ctx);
        let now = self.detector.stuck().copied();
        if now.map(|stuck| (stuck.cpu, stuck.others))
            == self.stuck.map(|stuck| (stuck.cpu, stuck.others))
        {
            return;
        }
        self.stuck = now;
        let said = self.said.clone();
        self.health_said(said.unwrap_or_else(|| stuck::unsaid(answer)), ctx);
    }

    /// Reads the instance's load from an answer to one of the detector's probes.
    fn take_sample(&mut self, answer: &HeartbeatRsp, ctx: &mut Context<Self>) {
        let mut sample = Sample::from(&answer.fixed);
        if !self.placement.backend.boots_kernels() {
            sample = sample.without_pressure();
        }
        self.tell(Event::Sample(sample), ctx);
        let overload = self.detector.overload().filter(|o| o.is_load());
        if self.load.changed(overload.is_some(), clock::now()) {
            let evidence = overload.map(ToString::to_string);
            self.tell_owner(WatchKind::Overload(evidence));
        }
    }

    fn attach(&mut self, ctx: &mut Context<Self>) {
        let id = self.platform.transport.new_attachment();
        self.attached = (self.platform.transport.incarnation(), Some(id));
        self.platform.transport.address().do_send(Attach {
            id,
            key: self.key.clone(),
            endpoint: self.placement.endpoint.clone(),
            speaker: self.machine.speaker(&self.placement),
            owner: ctx.address().recipient(),
        });
    }

    fn detach(&mut self) {
        if let (_, Some(id)) = std::mem::take(&mut self.attached) {
            let transport = self.platform.transport.address();
            transport.do_send(Detach(self.key.clone(), id));
        }
    }

    fn send_probe(&mut self, probe: u32) {
        crate::platform::fault::point("watch");
        if self.sent.len() == ROUND_TRIPS_MAX {
            self.sent.pop_first();
        }
        self.sent.insert(probe, clock::now());
        let self_lag_us = u32::try_from(self.self_lag.as_micros()).unwrap_or(u32::MAX);
        let request = HeartbeatReq {
            probe,
            flags: 0,
            self_lag_us,
        };
        self.platform.transport.address().do_send(SendProbe {
            key: self.key.clone(),
            request,
        });
    }

    /// Queries the backend about a silent instance.
    fn look_closer(&mut self, ctx: &mut Context<Self>) {
        let (backend, placement) = (self.machine.backend.clone(), self.placement.clone());
        let look = async move { backend.observe(&placement).await };
        let look = look.into_actor(self).map(|seen, act, _| {
            let over = seen.is_ok().then(|| act.unseen.end(clock::now()));
            if let Some(over) = over.flatten() {
                info!(act.log, "it can be observed again"; "failed" => %over);
            }
            seen
        });
        ctx.spawn(look.map(|seen, act, ctx| match seen {
            Ok(Observation::Stopped) => act.tell(Event::Observed { stopped: true }, ctx),
            Ok(Observation::Running) => act.tell(Event::Observed { stopped: false }, ctx),
            Ok(Observation::Ended(cause)) => act.tell(Event::Ended(cause.to_string()), ctx),
            Err(error) if act.unseen.failed(clock::now()) => {
                warn!(act.log, "it cannot be observed"; "error" => %error);
            }
            Err(_) => {}
        }));
        if self.placement.backend.boots_kernels() && !self.asking_kernel {
            self.ask_kernel(ctx);
        }
    }

    /// Stops the queries: the instance has answered, or the watch ends.
    fn look_no_closer(&mut self) {
        if let Some(over) = self.unseen.end(clock::now()) {
            warn!(self.log, "it was not observed while it was silent"; "failed" => %over);
        }
    }

    /// Queries the kernel of an instance whose agent is silent.
    fn ask_kernel(&mut self, ctx: &mut Context<Self>) {
        self.asking_kernel = true;
        let address = Address::from(self.placement.endpoint.clone());
        let hello = self.machine.hello(&self.key.instance, self.key.generation);
        let asked = async move { kernel::sign(&address, &hello).await };
        ctx.spawn(asked.into_actor(self).map(|sign, act, ctx| {
            act.asking_kernel = false;
            if let Some(sign) = sign {
                act.kernel_runs(sign, ctx);
            }
        }));
    }

    fn schedule(&mut self, ctx: &mut Context<Self>) {
        let due = self.detector.poll_timeout().filter(|_| !self.paused);
        if due == self.due && self.timer.is_some() {
            return;
        }
        if let Some(timer) = self.timer.take() {
            ctx.cancel_future(timer);
        }
        self.due = due;
        let Some(due) = due else { return };
        self.timer = Some(ctx.run_later(due - clock::now(), move |act, ctx| {
            act.timer = None;
            let late = clock::now() - due;
            if late >= LAG_MIN {
                act.self_lag = act.self_lag.max(late);
                act.detector.handle(Event::SelfLag(late), due);
            }
            act.bear_with_it();
            act.tell(Event::Tick, ctx);
        }));
    }

    /// Checks the boot id. A kernel that restarts within a generation is not that generation (docs/kmp.md, "Identity
    /// and fencing"): its state is lost and it must be recovered. Returns the evidence if that has happened.
    fn booted(&mut self, boot: BootId) -> Option<String> {
        match self.boot {
            None => {
                self.boot = Some(boot);
                self.tell_owner(WatchKind::Booted(boot));
                None
            }
            Some(first) if first == boot => None,
            Some(first) => Some(format!(
                "it started anew: its boot id was {:x} and is {:x}",
                u128::from_be_bytes(first),
                u128::from_be_bytes(boot)
            )),
        }
    }

    fn answered(&mut self, answer: HeartbeatRsp) -> Option<Duration> {
        let now = clock::now();
        self.last_answer = Some((now, answer));
        let rtt = now - self.sent.remove(&answer.fixed.probe)?;
        self.sent
            .retain(|probe, _| *probe > answer.fixed.probe || *probe >= PING_FIRST);
        self.rtt = Some(rtt);
        // Smoothing as in TCP's round-trip estimate (RFC 6298): seven parts old, one part new.
        self.smoothed_rtt = Some(self.smoothed_rtt.map_or(rtt, |old| (old * 7 + rtt) / 8));
        Some(rtt)
    }
}

impl Actor for Watch {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.attach(ctx);
        self.bear_with_it();
        let (backend, placement) = (self.machine.backend.clone(), self.placement.clone());
        let ended = async move { backend.ended(&placement).await };
        ctx.spawn(ended.into_actor(self).map(|cause: ExitCause, act, ctx| {
            act.tell(Event::Ended(cause.to_string()), ctx);
        }));
        self.schedule(ctx);
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.look_no_closer();
        self.detach();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.ended {
            self.tell_owner(WatchKind::Gone);
        }
    }
}

impl Handler<PeerUpdate> for Watch {
    type Result = ();

    fn handle(&mut self, update: PeerUpdate, ctx: &mut Self::Context) {
        match update {
            PeerUpdate::HeartbeatUp(hello) => {
                self.kernel_release = hello.kernel_release;
                (self.rejected, self.unreachable) = (None, None);
                if let Some(started_anew) = self.booted(hello.fixed.boot_id) {
                    return self.tell(Event::Ended(started_anew), ctx);
                }
                self.tell(Event::ChannelUp, ctx);
            }
            PeerUpdate::Displaced => {
                // The watch's state is lost: the owner starts over from the journal.
                ctx.stop();
            }
            PeerUpdate::HeartbeatDown(why) => {
                self.rejected = Some(why);
                self.tell(Event::ChannelLost, ctx);
            }
            PeerUpdate::Rejected(why) => self.rejected = Some(why),
            PeerUpdate::Unreachable(why) => self.unreachable = Some(why),
            PeerUpdate::KernelRefused => {
                self.unreachable = None;
                self.kernel_runs(Sign::Refused(KMP_PORT), ctx);
            }
            PeerUpdate::ProbeRefused(probe) => self.tell(Event::SendRefused { probe }, ctx),
            PeerUpdate::Answer(answer) => {
                let rtt = self.answered(answer);
                match (self.pings.remove(&answer.fixed.probe), rtt) {
                    (Some(ping), Some(rtt)) => drop(ping.send((rtt, answer))),
                    (_, rtt) => {
                        let (probe, health) = (answer.fixed.probe, answer.fixed.health);
                        self.tell(Event::Answer { probe, health }, ctx);
                        if rtt.is_some() {
                            self.take_sample(&answer, ctx);
                            self.heed_stall(&answer, ctx);
                        }
                    }
                }
            }
            PeerUpdate::Health(status) => self.health_said(status, ctx),
            PeerUpdate::Control(_) => {}
        }
    }
}
