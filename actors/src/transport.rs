//! The Transport actor: every connection, and which reply belongs to which request.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use kmorph_backends::contract::Endpoint;
use kmp_proto::codec::Frame;
use kmp_proto::message::{
    Channel, ErrorInfo, HealthStatus, HeartbeatReq, HeartbeatRsp, Hello, Message as Kmp,
};
use kmp_transport::link::Address;
use kmp_transport::peer::{Peer, PeerEvent};
use slog::{Logger, debug, error};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Requests that may be waiting for their reply at one peer.
pub const REQUESTS_MAX: usize = 16;
/// Longest wait before a request that was answered RETRY is sent again.
pub const RETRY_MAX: Duration = Duration::from_secs(30);

/// One generation of one instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey {
    /// The instance.
    pub instance: String,
    /// Its generation.
    pub generation: u64,
}

/// Begins to connect to a generation and to tell `owner` what happens on its channels.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Attach {
    /// Who.
    pub key: PeerKey,
    /// Where.
    pub endpoint: Endpoint,
    /// What the daemon says of itself.
    pub hello: Hello,
    /// Who is told.
    pub owner: Recipient<PeerUpdate>,
}

/// Ends the connections to a generation.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Detach(pub PeerKey);

/// What happened on a peer's channels, for the watch that owns it.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum PeerUpdate {
    /// The heartbeat channel is up.
    HeartbeatUp(Box<Hello>),
    /// The heartbeat channel is down.
    HeartbeatDown(String),
    /// Its kernel refused the connection.
    KernelRefused,
    /// Someone answers in its place or it breaks the protocol; why its channel was given up.
    Rejected(String),
    /// A heartbeat was answered.
    Answer(HeartbeatRsp),
    /// A probe could not be sent.
    ProbeRefused(u32),
    /// The agent says something about its health.
    Health(HealthStatus),
    /// The control channel is up or down.
    Control(bool),
}

/// Sends a heartbeat.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SendProbe {
    /// To whom.
    pub key: PeerKey,
    /// The probe.
    pub request: HeartbeatReq,
}

/// Sends a request on the control channel and waits for its reply.
#[derive(Message)]
#[rtype(result = "Result<Kmp, RequestError>")]
pub struct Request {
    /// To whom.
    pub key: PeerKey,
    /// What.
    pub message: Kmp,
    /// For how long.
    pub timeout: Duration,
}

/// Sends a message to every peer but those of one instance; replies are not waited for.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct Broadcast {
    /// The instance that is left out.
    pub except: String,
    /// What.
    pub message: Kmp,
}

/// Why a request has no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// There is no such peer, or its control channel is down.
    #[error("its control channel is down")]
    NotConnected,
    /// Too many requests wait already.
    #[error("{REQUESTS_MAX} requests wait for its answer already")]
    Busy,
    /// No reply in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// It did nothing, and is to be asked again after this time: [`TransportHandle::ask`] does.
    #[error("it is busy, and was to be asked again in {0:?}")]
    Retry(Duration),
    /// It refused.
    #[error("it refused: {}: {}", .0.code, .0.text)]
    Refused(ErrorInfo),
}

struct Attached {
    peer: Peer,
    owner: Recipient<PeerUpdate>,
    control_up: bool,
    /// Requests by token; those on the wire also by sequence.
    waiting: HashMap<u64, oneshot::Sender<Result<Kmp, RequestError>>>,
    on_wire: HashMap<u32, u64>,
}

/// The actor.
pub struct Transport {
    log: Logger,
    peers: BTreeMap<PeerKey, Attached>,
    next_token: u64,
}

/// Where the Transport is now: one that panicked is replaced by the supervisor. Stays on its thread.
#[derive(Clone)]
pub struct TransportHandle {
    current: Rc<RefCell<(u64, Addr<Transport>)>>,
}

impl TransportHandle {
    /// Starts the first one.
    pub fn start(log: &Logger) -> Self {
        let first = Transport::new(log.clone()).start();
        Self {
            current: Rc::new(RefCell::new((1, first))),
        }
    }

    /// Counts the actors there have been: one that is replaced takes its peers with it.
    pub fn incarnation(&self) -> u64 {
        self.current.borrow().0
    }

    /// The actor.
    pub fn address(&self) -> Addr<Transport> {
        self.current.borrow().1.clone()
    }

    /// Sends a request, and again for as long as it is answered RETRY and its time allows.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub async fn ask(&self, request: Request) -> Result<Kmp, RequestError> {
        let Request {
            key,
            message,
            timeout,
        } = request;
        let deadline = Instant::now() + timeout;
        for retries in 1.. {
            let again = Request {
                key: key.clone(),
                message: message.clone(),
                timeout: deadline.saturating_duration_since(Instant::now()),
            };
            let sent = self.address().send(again).await;
            let after = match sent.unwrap_or(Err(RequestError::NotConnected)) {
                Err(RequestError::Retry(after)) => after,
                Err(RequestError::TimedOut(_)) => break,
                answered => return answered,
            };
            let wait = retry_wait(after, retries, getrandom::u64().unwrap_or(0));
            if Instant::now() + wait >= deadline {
                break;
            }
            tokio::time::sleep(wait).await;
        }
        Err(RequestError::TimedOut(timeout))
    }

    /// Starts another one when this one has panicked; whether it did.
    pub fn replace_if_gone(&self, log: &Logger) -> bool {
        let mut current = self.current.borrow_mut();
        if current.1.connected() {
            return false;
        }
        *current = (current.0 + 1, Transport::new(log.clone()).start());
        true
    }
}

/// How long to wait after the `retries`-th RETRY in a row (docs/kmp.md): what was asked for, plus a random part
/// of it that doubles each time, [`RETRY_MAX`] at most.
fn retry_wait(after: Duration, retries: u32, random: u64) -> Duration {
    let most = after.saturating_mul(1u32.checked_shl(retries - 1).unwrap_or(u32::MAX));
    let part = u32::try_from(random % 1024).unwrap_or(0);
    let spread = most.min(RETRY_MAX) * part / 1024;
    after.saturating_add(spread).min(RETRY_MAX)
}

#[derive(Message)]
#[rtype(result = "()")]
struct FromPeer(PeerKey, PeerEvent);

impl Transport {
    /// An actor without connections.
    pub fn new(log: Logger) -> Self {
        Self {
            log,
            peers: BTreeMap::new(),
            next_token: 1,
        }
    }
}

impl Actor for Transport {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(65_536);
    }
}

impl Handler<Attach> for Transport {
    type Result = ();

    fn handle(&mut self, attach: Attach, ctx: &mut Self::Context) {
        let address = Address::from(attach.endpoint);
        let (own, key) = (ctx.address(), attach.key.clone());
        // A peer's task runs on this thread: it is never ahead of this mailbox by more than what
        // its socket held, so the mailbox bound is not needed to hold it back.
        let sink = Arc::new(move |event| own.do_send(FromPeer(key.clone(), event)));
        let seed = attach.key.generation ^ (attach.hello.instance.len() as u64) << 32;
        let peer = Peer::start(address, &attach.hello, seed.wrapping_mul(0x9E37_79B9), sink);
        let attached = Attached {
            peer,
            owner: attach.owner,
            control_up: false,
            waiting: HashMap::new(),
            on_wire: HashMap::new(),
        };
        self.peers.insert(attach.key, attached);
    }
}

impl Handler<Detach> for Transport {
    type Result = ();

    fn handle(&mut self, Detach(key): Detach, _: &mut Self::Context) {
        self.peers.remove(&key);
    }
}

impl Handler<SendProbe> for Transport {
    type Result = ();

    fn handle(&mut self, probe: SendProbe, _: &mut Self::Context) {
        crate::fault::point("transport");
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
        let full = attached.waiting.len() >= REQUESTS_MAX;
        if full
            || attached
                .peer
                .send(Channel::Control, token, request.message)
                .is_err()
        {
            return Box::pin(async { Err(RequestError::Busy) });
        }
        let (sender, receiver) = oneshot::channel();
        attached.waiting.insert(token, sender);
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

impl Handler<Broadcast> for Transport {
    type Result = usize;

    fn handle(&mut self, broadcast: Broadcast, _: &mut Self::Context) -> usize {
        let others = self
            .peers
            .iter()
            .filter(|(key, p)| key.instance != broadcast.except && p.control_up);
        let send = |p: &Attached| p.peer.send(Channel::Control, 0, broadcast.message.clone());
        others.filter(|(_, p)| send(p).is_ok()).count()
    }
}

impl Handler<FromPeer> for Transport {
    type Result = ();

    fn handle(&mut self, FromPeer(key, event): FromPeer, _: &mut Self::Context) {
        let Some(attached) = self.peers.get_mut(&key) else {
            return;
        };
        match event {
            PeerEvent::Up(Channel::Heartbeat, hello) => {
                attached.owner.do_send(PeerUpdate::HeartbeatUp(hello));
            }
            PeerEvent::Up(_, _) => {
                attached.control_up = true;
                attached.owner.do_send(PeerUpdate::Control(true));
            }
            PeerEvent::Down(Channel::Heartbeat, why) => {
                debug!(self.log, "heartbeat channel down"; "instance" => &key.instance,
                    "generation" => key.generation, "reason" => &why);
                attached.owner.do_send(PeerUpdate::HeartbeatDown(why));
            }
            PeerEvent::Down(_, _) => {
                attached.control_up = false;
                attached.on_wire.clear();
                for (_, waiting) in attached.waiting.drain() {
                    let _ = waiting.send(Err(RequestError::NotConnected));
                }
                attached.owner.do_send(PeerUpdate::Control(false));
            }
            PeerEvent::KernelRefused(Channel::Heartbeat) => {
                attached.owner.do_send(PeerUpdate::KernelRefused);
            }
            PeerEvent::KernelRefused(_) => {}
            PeerEvent::Rejected(channel, why) => {
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
                // Whoever waits for its answer waits no longer.
                attached.waiting.remove(&token);
            }
            PeerEvent::Frame(_, frame) => attached.frame(*frame),
        }
    }
}

impl Attached {
    fn frame(&mut self, frame: Frame) {
        let sequence = frame.header.sequence;
        match frame.message {
            Kmp::HeartbeatRsp(answer) => self.owner.do_send(PeerUpdate::Answer(answer)),
            Kmp::HealthStatus(status) => self.owner.do_send(PeerUpdate::Health(status)),
            Kmp::Error(error) => self.complete(sequence, Err(RequestError::Refused(error))),
            Kmp::Retry(retry) => {
                let after = Duration::from_millis(retry.retry_after_ms.into());
                self.complete(sequence, Err(RequestError::Retry(after)));
            }
            message if frame.header.reply => self.complete(sequence, Ok(message)),
            // An agent has nothing else to ask of its daemon.
            _ => {}
        }
    }

    fn complete(&mut self, sequence: u32, result: Result<Kmp, RequestError>) {
        let token = self.on_wire.remove(&sequence);
        if let Some(waiting) = token.and_then(|t| self.waiting.remove(&t)) {
            let _ = waiting.send(result);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use kmp_proto::message::{
        FailureCause, HelloFixed, PeerRole, RecoverFixed, RecoverNotice, RecoverReply, RetryAfter,
    };
    use kmp_proto::wire::{ErrorCode, VERSION};
    use kmp_transport::link::{KMP_PORT, Listener, UnixVsockListener};

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Hears what happens on the peer's channels.
    struct Owner;

    impl Actor for Owner {
        type Context = Context<Self>;
    }

    impl Handler<PeerUpdate> for Owner {
        type Result = ();

        fn handle(&mut self, _: PeerUpdate, _: &mut Self::Context) {}
    }

    fn hello(role: PeerRole) -> Hello {
        Hello {
            fixed: HelloFixed {
                version_min: VERSION,
                version_max: VERSION,
                role,
                channel: Channel::Control,
                flags: 0,
                generation: 1,
                boot_id: [1; 16],
                features: 0,
                session: 0,
            },
            instance: "web".to_owned(),
            kernel_release: String::new(),
            agent_version: String::new(),
        }
    }

    fn notice() -> Kmp {
        Kmp::RecoverPrepare(RecoverNotice {
            fixed: RecoverFixed {
                recovery: 7,
                failed_generation: 3,
                cause: FailureCause::KernelDead,
            },
            instance: "db".to_owned(),
            text: String::new(),
        })
    }

    /// An instance that puts off each request so often before it answers.
    fn serve(path: &Path, put_offs: usize) {
        let listener = Listener::Unix(UnixVsockListener::bind(path, KMP_PORT).unwrap());
        let mut connections =
            kmp_transport::server::serve(listener, hello(PeerRole::Instance), |_: &str| ());
        actix::spawn(async move {
            while let Some(mut connection) = connections.recv().await {
                actix::spawn(async move {
                    let mut asked = 0;
                    while let Ok(frame) = connection.reader.next().await {
                        let sequence = frame.header.sequence;
                        asked += 1;
                        let answer = if asked <= put_offs {
                            Kmp::Retry(RetryAfter {
                                retry_after_ms: 1,
                                reason: ErrorCode::Busy,
                                offending_type: frame.header.msg_type as u16,
                                offending_sequence: sequence,
                            })
                        } else {
                            Kmp::RecoverPrepareReply(RecoverReply {
                                recovery: 7,
                                elapsed_ms: 0,
                            })
                        };
                        connection.writer.reply(&answer, sequence).await.unwrap();
                    }
                });
            }
        });
    }

    async fn asked(put_offs: usize, timeout: Duration) -> Result<Kmp, RequestError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        serve(&path, put_offs);
        let transport = TransportHandle::start(&Logger::root(slog::Discard, slog::o!()));
        let key = PeerKey {
            instance: "web".to_owned(),
            generation: 1,
        };
        transport.address().do_send(Attach {
            key: key.clone(),
            endpoint: Endpoint::Unix { path },
            hello: hello(PeerRole::Daemon),
            owner: Owner.start().recipient(),
        });
        let begun = Instant::now();
        loop {
            let request = Request {
                key: key.clone(),
                message: notice(),
                timeout,
            };
            match transport.ask(request).await {
                Err(RequestError::NotConnected) if begun.elapsed() < PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                answered => return answered,
            }
        }
    }

    #[actix::test]
    async fn a_request_that_is_put_off_is_asked_again_until_its_time_is_over() {
        let answered = asked(3, PATIENCE).await;
        assert!(
            matches!(answered, Ok(Kmp::RecoverPrepareReply(_))),
            "{answered:?}"
        );
        let little = Duration::from_millis(50);
        let given_up = asked(usize::MAX, little).await;
        assert_eq!(given_up, Err(RequestError::TimedOut(little)));
    }

    #[test]
    fn each_wait_is_what_was_asked_for_and_a_part_that_doubles() {
        let ms = Duration::from_millis;
        assert_eq!(retry_wait(ms(100), 1, 0), ms(100));
        assert_eq!(retry_wait(ms(100), 1, 512), ms(150));
        assert_eq!(retry_wait(ms(100), 3, 512), ms(300));
        assert_eq!(retry_wait(ms(100), u32::MAX, 1023), RETRY_MAX);
        assert_eq!(retry_wait(Duration::MAX, 1, 1023), RETRY_MAX);
    }
}
