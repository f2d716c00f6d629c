//! The Transport actor: all connections, and the match of replies to requests.

mod handle;
mod notices;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use kmorph_backends::contract::Endpoint;
use kmp_proto::codec::Frame;
use kmp_proto::message::{
    Channel, ErrorInfo, Expected, HealthStatus, HeartbeatReq, HeartbeatRsp, Hello, Message as Kmp,
    ReplyError,
};
use kmp_transport::link::Address;
use kmp_transport::peer::{Peer, PeerEvent};
use kmp_transport::speaker::Speaker;
use slog::{Logger, debug, error};
use tokio::sync::oneshot;

pub use handle::{AttachmentId, RETRY_MAX, TransportHandle};
pub use kmp_transport::link::{Network, SystemNetwork};
pub use notices::{
    Broadcast, EARLY_BURST, EARLY_PER_S, NOTICES_MAX, TOPOLOGY_ENTRIES_PER_S, TOPOLOGY_PORTION,
    Topology,
};
use notices::{Notices, Telling};

use crate::model::guest_text;

/// Maximum number of requests per peer that wait for a reply.
pub const REQUESTS_MAX: usize = 16;

/// Maximum number of requests in this actor's mailbox before senders wait. Messages from channels
/// (`do_send`) do not count; see [`Attach`] for their bound.
const TRANSPORT_MAILBOX: usize = 65_536;

/// One generation of one instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey {
    /// The instance.
    pub instance: String,
    /// Its generation.
    pub generation: u64,
}

/// Connects to a generation and reports the events on its channels to `owner`.
///
/// Neither this actor's mailbox nor the owner's holds a channel back, and neither needs to: the task that reads a
/// channel runs on the thread of both actors. It reads a fixed number of bytes at a time, and after a fixed number of
/// reads the runtime makes it yield (tokio's cooperative budget), however fast its peer is. Both mailboxes are emptied
/// before its next turn. So a peer can be ahead of them by the data of one turn and no more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Attach {
    /// The generation.
    pub key: PeerKey,
    /// Its endpoint.
    pub endpoint: Endpoint,
    /// The daemon's HELLO, and the key that proves its identity.
    pub speaker: Speaker,
    /// Receives the reports.
    pub owner: Recipient<PeerUpdate>,
    /// Id of this attachment.
    pub id: AttachmentId,
}

/// Closes the connections of an attachment. Does nothing if another attachment has taken its place: the channels of
/// a generation belong to one watch, and the end of an earlier watch must not silence a later one.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Detach(pub PeerKey, pub AttachmentId);

/// Events on a peer's channels, for the watch that owns the peer.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum PeerUpdate {
    /// The heartbeat channel is up.
    HeartbeatUp(Box<Hello>),
    /// The heartbeat channel is down.
    HeartbeatDown(String),
    /// Its kernel refused the connection.
    KernelRefused,
    /// The heartbeat channel cannot be connected, for a reason that says nothing about its kernel.
    Unreachable(String),
    /// Another program answers in its place, or the peer violates the protocol: the reason for giving up its channel.
    Rejected(String),
    /// A heartbeat was answered.
    Answer(HeartbeatRsp),
    /// A probe could not be sent.
    ProbeRefused(u32),
    /// The agent reports its health.
    Health(HealthStatus),
    /// The control channel is up or down.
    Control(bool),
    /// Another watch has attached to the same generation: this one receives no more answers.
    Displaced,
}

/// Sends a heartbeat.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SendProbe {
    /// The recipient.
    pub key: PeerKey,
    /// The probe.
    pub request: HeartbeatReq,
}

/// Sends a request on the control channel and waits for its reply.
#[derive(Message)]
#[rtype(result = "Result<Kmp, RequestError>")]
pub struct Request {
    /// The recipient.
    pub key: PeerKey,
    /// The request.
    pub message: Kmp,
    /// Maximum time.
    pub timeout: Duration,
}

/// Why a request has no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The peer does not exist, or its control channel is down.
    #[error("its control channel is down")]
    NotConnected,
    /// Too many requests are waiting already.
    #[error("{REQUESTS_MAX} requests wait for its answer already")]
    Busy,
    /// No reply in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The peer did nothing; the request may be repeated after this time, as [`TransportHandle::ask`] does.
    #[error("it is busy, and was to be asked again in {0:?}")]
    Retry(Duration),
    /// The peer refused.
    #[error("it refused: {}: {}", .0.code, .0.text)]
    Refused(ErrorInfo),
    /// The reply does not match the request.
    #[error("it answered wrongly: {0}")]
    WrongReply(#[from] ReplyError),
    /// The peer or this daemon lacks a feature that the request needs: bits of
    /// [`features`](kmp_proto::message::features).
    #[error("the request needs the features {0:#x}, which not both sides have")]
    NoFeature(u64),
}

/// A request that waits for its reply.
struct Waiting {
    tell: oneshot::Sender<Result<Kmp, RequestError>>,
    /// The expected reply.
    expected: Option<Expected>,
}

struct Attached {
    id: AttachmentId,
    peer: Peer,
    owner: Recipient<PeerUpdate>,
    control_up: bool,
    /// This daemon's features; while the control channel is up, `features` has those of both sides.
    own_features: u64,
    features: u64,
    /// Requests by token; sent requests also by sequence.
    waiting: BTreeMap<u64, Waiting>,
    on_wire: BTreeMap<u32, u64>,
    notices: Notices,
}

/// The actor.
pub struct Transport {
    log: Logger,
    network: Arc<dyn Network>,
    peers: BTreeMap<PeerKey, Attached>,
    next_token: u64,
    telling: Telling,
}

#[derive(Message)]
#[rtype(result = "()")]
struct FromPeer(PeerKey, PeerEvent);

impl Transport {
    /// Creates an actor without connections.
    pub fn new(log: Logger, network: Arc<dyn Network>) -> Self {
        Self {
            log,
            network,
            peers: BTreeMap::new(),
            next_token: 1,
            telling: Telling::default(),
        }
    }
}

impl Actor for Transport {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(TRANSPORT_MAILBOX);
    }
}

impl Handler<Attach> for Transport {
    type Result = ();

    fn handle(&mut self, attach: Attach, ctx: &mut Self::Context) {
        let address = Address::from(attach.endpoint);
        let (own, key) = (ctx.address(), attach.key.clone());
        let sink = Arc::new(move |event| own.do_send(FromPeer(key.clone(), event)));
        let seed = attach.key.generation ^ (attach.speaker.hello().instance.len() as u64) << 32;
        let peer = Peer::through(
            Arc::clone(&self.network),
            address,
            &attach.speaker,
            seed.wrapping_mul(0x9E37_79B9),
            sink,
        );
        let attached = Attached {
            id: attach.id,
            peer,
            owner: attach.owner,
            control_up: false,
            own_features: attach.speaker.hello().fixed.features,
            features: 0,
            waiting: BTreeMap::new(),
            on_wire: BTreeMap::new(),
            notices: Notices::default(),
        };
        let key = attach.key.clone();
        if let Some(before) = self.peers.insert(attach.key, attached) {
            error!(self.log, "two watches attached to one generation: the later one stays";
                "instance" => &key.instance, "generation" => key.generation);
            before.owner.do_send(PeerUpdate::Displaced);
        }
    }
}

impl Handler<Detach> for Transport {
    type Result = ();

    fn handle(&mut self, Detach(key, id): Detach, _: &mut Self::Context) {
        if self
            .peers
            .get(&key)
            .is_some_and(|attached| attached.id == id)
        {
            self.peers.remove(&key);
        }
    }
}

impl Handler<SendProbe> for Transport {
    type Result = ();

    fn handle(&mut self, probe: SendProbe, _: &mut Self::Context) {
        crate::platform::fault::point("transport");
        let Some(attached) = self.peers.get(&probe.key) else {
            return;
        };
        let number = probe.request.probe;
        let message = Kmp::HeartbeatReq(probe.request);
        if attached.peer.send(Channel::Heartbeat, 0, message).is_err() {
            attached.owner.do_send(PeerUpdate::ProbeRefused(number));
        }
    }
}

impl Handler<Request> for Transport {
    type Result = ResponseFuture<Result<Kmp, RequestError>>;

    fn handle(&mut self, request: Request, ctx: &mut Self::Context) -> Self::Result {
        let token = self.next_token;
        self.next_token += 1;
        let Some(attached) = self.peers.get_mut(&request.key).filter(|p| p.control_up) else {
            return Box::pin(async { Err(RequestError::NotConnected) });
        };
        let missing = request.message.needs() & !attached.features;
        if missing != 0 {
            return Box::pin(async move { Err(RequestError::NoFeature(missing)) });
        }
        let expected = Expected::of(&request.message);
        let full = attached.waiting.len() >= REQUESTS_MAX;
        if full
            || attached
                .peer
                .send(Channel::Control, token, request.message)
                .is_err()
        {
            return Box::pin(async { Err(RequestError::Busy) });
        }
        let (tell, receiver) = oneshot::channel();
        attached.waiting.insert(token, Waiting { tell, expected });
        let (own, key, timeout) = (ctx.address(), request.key, request.timeout);
        Box::pin(async move {
            match tokio::time::timeout(timeout, receiver).await {
                Ok(reply) => reply.unwrap_or(Err(RequestError::NotConnected)),
                Err(_) => {
                    own.do_send(Forget(key, token));
                    Err(RequestError::TimedOut(timeout))
                }
            }
        })
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Forget(PeerKey, u64);

impl Handler<Forget> for Transport {
    type Result = ();

    fn handle(&mut self, Forget(key, token): Forget, _: &mut Self::Context) {
        if let Some(attached) = self.peers.get_mut(&key) {
            attached.waiting.remove(&token);
            attached.on_wire.retain(|_, t| *t != token);
        }
    }
}

impl Handler<FromPeer> for Transport {
    type Result = ();

    fn handle(&mut self, FromPeer(key, event): FromPeer, ctx: &mut Self::Context) {
        let Some(attached) = self.peers.get_mut(&key) else {
            return;
        };
        match event {
            PeerEvent::Up(Channel::Heartbeat, mut hello) => {
                guest_text::clean_hello(&mut hello);
                attached.owner.do_send(PeerUpdate::HeartbeatUp(hello));
            }
            PeerEvent::Up(_, hello) => {
                attached.control_up = true;
                attached.features = attached.own_features & hello.fixed.features;
                attached.owner.do_send(PeerUpdate::Control(true));
                self.tell_owed(&key, ctx);
            }
            PeerEvent::Down(Channel::Heartbeat, why) => {
                let why = guest_text::line(&why);
                debug!(self.log, "heartbeat channel down"; "instance" => &key.instance,
                    "generation" => key.generation, "reason" => &why);
                attached.owner.do_send(PeerUpdate::HeartbeatDown(why));
            }
            PeerEvent::Down(_, _) => {
                attached.control_up = false;
                attached.on_wire.clear();
                attached.forget_notices();
                for (_, waiting) in std::mem::take(&mut attached.waiting) {
                    let _ = waiting.tell.send(Err(RequestError::NotConnected));
                }
                attached.owner.do_send(PeerUpdate::Control(false));
            }
            PeerEvent::KernelRefused(Channel::Heartbeat) => {
                attached.owner.do_send(PeerUpdate::KernelRefused);
            }
            PeerEvent::Unreachable(Channel::Heartbeat, why) => {
                attached.owner.do_send(PeerUpdate::Unreachable(why));
            }
            PeerEvent::KernelRefused(_) | PeerEvent::Unreachable(..) => {}
            PeerEvent::Rejected(channel, why) => {
                let why = guest_text::line(&why);
                debug!(self.log, "connection given up"; "instance" => &key.instance,
                    "generation" => key.generation, "channel" => channel.as_str(), "reason" => &why);
                if channel == Channel::Heartbeat {
                    attached.owner.do_send(PeerUpdate::Rejected(why));
                }
            }
            PeerEvent::Sent {
                channel: Channel::Control,
                token,
                sequence,
            } if token != 0 => {
                attached.on_wire.insert(sequence, token);
            }
            PeerEvent::Sent { .. } => {}
            PeerEvent::Unsendable {
                channel,
                token,
                reason,
            } => {
                error!(self.log, "a message of this daemon's does not fit into a frame";
                    "instance" => &key.instance, "generation" => key.generation,
                    "channel" => channel.as_str(), "reason" => reason);
                // The caller no longer waits for the answer.
                attached.waiting.remove(&token);
                attached.give_up_notice(token);
            }
            PeerEvent::Frame(channel, mut frame) => {
                guest_text::clean(&mut frame.message);
                let answer = attached.frame(*frame);
                let Some((sequence, result)) = answer.filter(|_| channel == Channel::Control)
                else {
                    return;
                };
                let Some(token) = attached.on_wire.remove(&sequence) else {
                    return;
                };
                match attached.waiting.remove(&token) {
                    Some(Waiting { tell, expected }) => drop(tell.send(checked(result, expected))),
                    None => attached.notice_answered(&key, token, result, &self.log, ctx),
                }
            }
        }
    }
}

impl Attached {
    /// Returns the request's sequence and the answer, if the frame is an answer.
    fn frame(&mut self, frame: Frame) -> Option<(u32, Result<Kmp, RequestError>)> {
        let result = match frame.message {
            Kmp::HeartbeatRsp(answer) => {
                self.owner.do_send(PeerUpdate::Answer(answer));
                return None;
            }
            Kmp::HealthStatus(status) => {
                self.owner.do_send(PeerUpdate::Health(status));
                return None;
            }
            Kmp::Error(error) => Err(RequestError::Refused(error)),
            Kmp::Retry(retry) => {
                let after = Duration::from_millis(retry.retry_after_ms.into());
                Err(RequestError::Retry(after))
            }
            message if frame.header.reply => Ok(message),
            // An agent sends its daemon no other requests.
            _ => return None,
        };
        Some((frame.header.sequence, result))
    }
}

/// Converts a reply that does not match its request to an error for the caller.
fn checked(
    result: Result<Kmp, RequestError>,
    expected: Option<Expected>,
) -> Result<Kmp, RequestError> {
    let reply = result?;
    expected.map_or(Ok(()), |expected| expected.check(&reply))?;
    Ok(reply)
}

#[cfg(test)]
mod tests;
