//! Notices to the survivors of failures, and their answers. No recovery waits for them.
//!
//! Each recovery could send three notices to each instance, the last of which lists all instances. With n instances and
//! k recoveries, that is k·n messages and k·n² entries. So all notices are bounded:
//!
//! - A topology (RECOVER_COMPLETE) is for all peers. The daemon owes a peer only the newest one, until the peer has
//!   answered it, also if the peer defers it or is unreachable now. At most one topology is under way to a peer, and
//!   the rate to all peers together is [`TOPOLOGY_ENTRIES_PER_S`]. A topology that is replaced before its turn is never
//!   sent. A topology that does not fit into a frame is sent in parts, each in a separate turn after the answer to the
//!   previous part; on a new connection, it starts again from the first part.
//! - RECOVER_PREPARE and RECOVER_RECLAIM describe work under way; a peer that misses them learns the outcome from the
//!   topology. They are sent at once to all peers or, after too many of them ([`EARLY_PER_S`]), to none.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use kmp_proto::message::{Channel, Expected, Message as Kmp, RecoverComplete};
use kmp_proto::time::Instant;
use kmp_proto::wire::MsgType;
use kmp_transport::peer::SendRefused;
use slog::{Logger, debug, info, o, warn};

use super::handle::retry_wait;
use super::{Attached, PeerKey, RequestError, Transport, checked};
use crate::platform::ambient;
use crate::platform::clock;

/// Maximum number of unanswered RECOVER_PREPARE and RECOVER_RECLAIM per peer; above that, the peer receives no more of
/// them.
pub const NOTICES_MAX: usize = 16;
/// Maximum number of topology entries sent per second, to all peers together. An agent needs one to two
/// microseconds per entry, and with the `embedded` backend all agents share the host's CPUs with the recoveries.
pub const TOPOLOGY_ENTRIES_PER_S: u32 = 200_000;
/// Interval between two portions of topologies.
pub const TOPOLOGY_PORTION: Duration = Duration::from_millis(20);
/// Long-term maximum number of RECOVER_PREPARE and RECOVER_RECLAIM sent per second, to all peers together.
pub const EARLY_PER_S: u32 = 500;
/// Maximum burst of them after a quiet time: both messages of one recovery to the maximum number of instances.
pub const EARLY_BURST: u32 = 4_096;
/// Minimum interval between two log lines about suppressed notices.
const EARLY_SAID_MIN: Duration = Duration::from_secs(10);
/// Wait before a topology is sent again to a peer whose queue was full.
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(500);

/// Sends RECOVER_PREPARE or RECOVER_RECLAIM to all peers except those of one instance, unless too many were sent
/// lately.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Broadcast {
    /// The instance to leave out.
    pub except: String,
    /// The message.
    pub message: Kmp,
}

/// A newer topology, owed to all peers except those of the recovered instance.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Topology(pub RecoverComplete);

/// The notices of one peer.
#[derive(Default)]
pub(super) struct Notices {
    /// Sent and unanswered notices, oldest first, by token.
    early: VecDeque<Sent>,
    owed: Option<Owed>,
    /// The topology, or its part, that is under way.
    under_way: Option<Sent>,
    /// True while the peer is in the line for a topology.
    in_line: bool,
}

/// A message that waits for its answer.
struct Sent {
    token: u64,
    kind: MsgType,
    /// The expected answer.
    expected: Option<Expected>,
}

impl Sent {
    fn new(token: u64, message: &Kmp) -> Self {
        Self {
            token,
            kind: message.msg_type(),
            expected: Expected::of(message),
        }
    }
}

/// The newest topology.
struct Owed {
    /// Shared: a topology may be large, and may be owed to many peers.
    parts: Rc<[Kmp]>,
    /// Index of the next part to be answered.
    at: usize,
    /// Maximum number of entries in a part, plus one for the rest of the message.
    size: u32,
    /// Token of its last transmission; 0 if it was not sent yet.
    token: u64,
    /// Number of times that the peer deferred it.
    retries: u32,
}

/// The notices of all peers.
#[derive(Default)]
pub(super) struct Telling {
    /// Peers that wait for their turn to receive a topology.
    line: VecDeque<PeerKey>,
    /// True until the next portion is due.
    waits: bool,
    early: Allowance,
}

/// A token bucket: the allowance grows with time, up to a burst.
struct Allowance {
    left: u32,
    since: Option<Instant>,
    /// Time of the last log line about a refusal.
    said: Option<Instant>,
}

impl Default for Allowance {
    fn default() -> Self {
        Self {
            left: EARLY_BURST,
            since: None,
            said: None,
        }
    }
}

impl Allowance {
    /// Takes `count` if the allowance suffices.
    fn take(&mut self, count: u32, now: Instant) -> bool {
        let passed = self.since.map_or(Duration::ZERO, |since| now - since);
        let grown = passed.as_millis() * u128::from(EARLY_PER_S) / 1000;
        if grown > 0 || self.since.is_none() {
            let grown = u32::try_from(grown).unwrap_or(EARLY_BURST);
            self.left = self.left.saturating_add(grown).min(EARLY_BURST);
            self.since = Some(now);
        }
        let left = self.left.checked_sub(count);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }

    /// Returns whether to log a refusal.
    fn say(&mut self, now: Instant) -> bool {
        let soon = self.said.is_some_and(|said| now - said < EARLY_SAID_MIN);
        self.said = if soon { self.said } else { Some(now) };
        !soon
    }
}

/// Sends a deferred notice again; its wait is over.
#[derive(Message)]
#[rtype(result = "()")]
struct SendAgain(PeerKey, u64);

impl Handler<Broadcast> for Transport {
    type Result = ();

    fn handle(&mut self, broadcast: Broadcast, _: &mut Self::Context) {
        let message = broadcast.message;
        let all = self.peers.iter_mut();
        let survivors = all.filter(|(key, p)| p.control_up && key.instance != broadcast.except);
        let mut survivors: Vec<_> = survivors.map(|(_, peer)| peer).collect();
        let count = u32::try_from(survivors.len()).unwrap_or(u32::MAX);
        let (early, now) = (&mut self.telling.early, clock::now());
        if !early.take(count, now) {
            if early.say(now) {
                info!(self.log, "many recoveries at once: survivors are told of the outcome alone";
                    "instance" => broadcast.except, "survivors" => count);
            }
            return;
        }
        for peer in &mut survivors {
            peer.send_early(self.next_token, &message);
            self.next_token += 1;
        }
    }
}

impl Handler<Topology> for Transport {
    type Result = ();

    fn handle(&mut self, Topology(complete): Topology, ctx: &mut Self::Context) {
        let except = complete.instance.clone();
        let entries = complete.topology.len();
        let parts: Rc<[Kmp]> = {
            let parts = complete.into_parts().into_iter();
            parts.map(Kmp::RecoverComplete).collect()
        };
        let size = entries / parts.len().max(1) + 1;
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let Self { peers, telling, .. } = self;
        for (key, peer) in peers.iter_mut().filter(|(key, _)| key.instance != except) {
            peer.notices.owed = Some(Owed {
                parts: Rc::clone(&parts),
                at: 0,
                size,
                token: 0,
                retries: 0,
            });
            peer.stand_in_line(key, telling);
        }
        self.send_portion(ctx);
    }
}

impl Handler<SendAgain> for Transport {
    type Result = ();

    fn handle(&mut self, SendAgain(key, token): SendAgain, ctx: &mut Self::Context) {
        // Another topology or another connection may have taken its place.
        let same = |peer: &&mut Attached| {
            let owed = peer.notices.owed.as_ref();
            owed.is_some_and(|owed| owed.token == token)
        };
        if let Some(peer) = self.peers.get_mut(&key).filter(same) {
            peer.stand_in_line(&key, &mut self.telling);
            self.send_portion(ctx);
        }
    }
}

impl Transport {
    /// Sends the owed topology now that the control channel of `key` is up.
    pub(super) fn tell_owed(&mut self, key: &PeerKey, ctx: &mut Context<Self>) {
        if let Some(peer) = self.peers.get_mut(key) {
            peer.stand_in_line(key, &mut self.telling);
            self.send_portion(ctx);
        }
    }

    /// Sends topologies to the peers whose turn it is, unless the next portion is due later.
    fn send_portion(&mut self, ctx: &mut Context<Self>) {
        let portions_per_s = 1000
            / u32::try_from(TOPOLOGY_PORTION.as_millis())
                .unwrap_or(1)
                .max(1);
        let mut left = TOPOLOGY_ENTRIES_PER_S / portions_per_s;
        if self.telling.waits || self.telling.line.is_empty() {
            return;
        }
        while left > 0
            && let Some(key) = self.telling.line.pop_front()
        {
            let Some(peer) = self.peers.get_mut(&key) else {
                continue;
            };
            let token = self.next_token;
            self.next_token += 1;
            match peer.send_owed(token) {
                Ok(sent) => left = left.saturating_sub(sent),
                Err(SendRefused(_)) => {
                    ctx.notify_later(SendAgain(key, token), QUEUE_FULL_WAIT);
                }
            }
        }
        // Set even if no peer is left in the line: the next peer must not start a portion of its own.
        self.telling.waits = true;
        ctx.run_later(TOPOLOGY_PORTION, |act, ctx| {
            act.telling.waits = false;
            act.send_portion(ctx);
        });
    }
}

impl Attached {
    /// Joins the line if the peer is owed a topology, is reachable, and has no topology under way.
    fn stand_in_line(&mut self, key: &PeerKey, telling: &mut Telling) {
        let notices = &mut self.notices;
        let ready = self.control_up && notices.owed.is_some() && notices.under_way.is_none();
        if ready && !notices.in_line {
            notices.in_line = true;
            telling.line.push_back(key.clone());
        }
    }

    fn send_early(&mut self, token: u64, message: &Kmp) {
        if self.notices.early.len() >= NOTICES_MAX {
            return;
        }
        let sent = self.peer.send(Channel::Control, token, message.clone());
        if sent.is_ok() {
            self.notices.early.push_back(Sent::new(token, message));
        }
    }

    /// Sends the owed topology. Returns the number of entries sent.
    fn send_owed(&mut self, token: u64) -> Result<u32, SendRefused> {
        let notices = &mut self.notices;
        notices.in_line = false;
        let ready = self.control_up && notices.under_way.is_none();
        let Some(owed) = notices.owed.as_mut().filter(|_| ready) else {
            return Ok(0);
        };
        owed.token = token;
        let Some(part) = owed.parts.get(owed.at) else {
            return Ok(0);
        };
        self.peer.send(Channel::Control, token, part.clone())?;
        notices.under_way = Some(Sent::new(token, part));
        Ok(owed.size)
    }

    /// Forgets unanswered notices: their answers will not arrive. An owed topology in parts starts again.
    pub(super) fn forget_notices(&mut self) {
        self.notices.early.clear();
        self.notices.under_way = None;
        if let Some(owed) = &mut self.notices.owed {
            owed.at = 0;
        }
    }

    /// Drops a message that does not fit into a frame.
    pub(super) fn give_up_notice(&mut self, token: u64) {
        self.notices.early.retain(|sent| sent.token != token);
        self.notices.owed.take_if(|owed| owed.token == token);
        self.notices.under_way.take_if(|sent| sent.token == token);
    }

    /// Handles a survivor's answer.
    pub(super) fn notice_answered(
        &mut self,
        key: &PeerKey,
        token: u64,
        result: Result<Kmp, RequestError>,
        log: &Logger,
        ctx: &mut Context<Transport>,
    ) {
        let early = &mut self.notices.early;
        let early = match early.iter().position(|sent| sent.token == token) {
            Some(at) => early.remove(at),
            None => None,
        };
        let log = |kind: MsgType| {
            log.new(
                o!("instance" => key.instance.clone(), "generation" => key.generation,
                "type" => kind.name()),
            )
        };
        if let Some(Sent { kind, expected, .. }) = early {
            return heard(&log(kind), checked(result, expected));
        }
        let under_way = self.notices.under_way.take_if(|sent| sent.token == token);
        let Some(Sent { kind, expected, .. }) = under_way else {
            return;
        };
        let log = log(kind);
        let newest = |owed: &&mut Owed| owed.token == token;
        match (
            checked(result, expected),
            self.notices.owed.as_mut().filter(newest),
        ) {
            (Err(RequestError::Retry(after)), Some(owed)) => {
                owed.retries += 1;
                let random = ambient::random().unwrap_or(0);
                let wait = retry_wait(after, owed.retries, random);
                debug!(log, "a survivor put a message off"; "again_in_ms" => millis(wait));
                ctx.notify_later(SendAgain(key.clone(), token), wait);
            }
            (Ok(_), Some(owed)) if owed.at + 1 < owed.parts.len() => {
                (owed.at, owed.retries) = (owed.at + 1, 0);
                ctx.notify(TellNewer(key.clone()));
            }
            (result, Some(_)) => {
                self.notices.owed = None;
                heard(&log, result);
            }
            // A newer topology has taken its place in the meantime.
            (result, None) => {
                heard(&log, result);
                ctx.notify(TellNewer(key.clone()));
            }
        }
    }
}

/// The peer is ready for the next part of a topology, or for a newer one that arrived in the meantime.
#[derive(Message)]
#[rtype(result = "()")]
struct TellNewer(PeerKey);

impl Handler<TellNewer> for Transport {
    type Result = ();

    fn handle(&mut self, TellNewer(key): TellNewer, ctx: &mut Self::Context) {
        self.tell_owed(&key, ctx);
    }
}

fn heard(log: &Logger, result: Result<Kmp, RequestError>) {
    match result {
        Ok(_) => debug!(log, "a survivor was told"),
        Err(error) => warn!(log, "a survivor did not take a message"; "reason" => %error),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_about_to_be_is_told_up_to_a_burst_and_then_at_a_rate() {
        let mut allowance = Allowance::default();
        let whole = |count: u32| count as usize / 100;
        let at = |ms: u64| Instant::from_nanos((1_000 + ms) * 1_000_000);
        let told = |allowance: &mut Allowance, ms| {
            let count = 100;
            (0..1_000).filter(|_| allowance.take(count, at(ms))).count()
        };
        assert_eq!(told(&mut allowance, 0), whole(EARLY_BURST));
        assert_eq!(told(&mut allowance, 1_000), whole(EARLY_PER_S));
        // Small steps add up.
        let steps: usize = (0..1_000).map(|ms| told(&mut allowance, 1_001 + ms)).sum();
        assert_eq!(steps, whole(EARLY_PER_S));
        assert_eq!(told(&mut allowance, 3_600_000), whole(EARLY_BURST));
        assert!(!allowance.take(EARLY_BURST + 1, at(7_200_000)));
        assert!(allowance.say(at(0)) && !allowance.say(at(9_999)) && allowance.say(at(10_000)));
    }
}
