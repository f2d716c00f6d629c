//! What survivors of a failure are told, and what they answer. No recovery waits for them.
//!
//! A peer is owed the newest RECOVER_COMPLETE, and no older one, until it has answered it: it is sent
//! again when the peer puts it off, and when its control channel is up again. One that does not fit into a
//! frame goes in parts, each sent once the one before it is answered, and from the first on another
//! connection. The two messages before it are about what is under way; who missed them learns the outcome.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use kmp_proto::message::{Channel, Expected, Message as Kmp};
use kmp_proto::wire::MsgType;
use slog::{Logger, debug, o, warn};

use super::handle::retry_wait;
use super::{Attached, PeerKey, RequestError, Transport, checked};

/// Messages to one peer whose answers are waited for; an answer to an older one is not looked at.
pub const NOTICES_MAX: usize = 16;

/// Sends a message to every peer but those of one instance. A RECOVER_COMPLETE also reaches, later, those
/// whose control channel is down now.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Broadcast {
    /// The instance that is left out.
    pub except: String,
    /// What.
    pub message: Kmp,
}

/// Of one peer.
#[derive(Default)]
pub(super) struct Notices {
    /// Sent and not answered, oldest first, by token.
    sent: VecDeque<Sent>,
    owed: Option<Owed>,
}

/// A message whose answer is waited for.
struct Sent {
    token: u64,
    kind: MsgType,
    expected: Option<Expected>,
}

/// The newest topology.
struct Owed {
    /// Shared: it may be large, and many may be owed it.
    parts: Rc<[Kmp]>,
    /// The part that is to be answered next.
    at: usize,
    /// Of the last time that it was sent.
    token: u64,
    /// Times that it was put off.
    retries: u32,
}

/// The time after which what was put off is sent again is over.
#[derive(Message)]
#[rtype(result = "()")]
struct SendAgain(PeerKey, u64);

impl Handler<Broadcast> for Transport {
    type Result = ();

    fn handle(&mut self, broadcast: Broadcast, _: &mut Self::Context) {
        let lasting = broadcast.message.msg_type() == MsgType::RecoverComplete;
        let parts: Rc<[Kmp]> = match broadcast.message {
            Kmp::RecoverComplete(complete) => {
                let parts = complete.into_parts().into_iter();
                parts.map(Kmp::RecoverComplete).collect()
            }
            other => Rc::from([other]),
        };
        let peers = self.peers.iter_mut();
        for (_, peer) in peers.filter(|(key, _)| key.instance != broadcast.except) {
            let token = self.next_token;
            self.next_token += 1;
            if lasting {
                peer.notices.owed = Some(Owed {
                    parts: Rc::clone(&parts),
                    at: 0,
                    token,
                    retries: 0,
                });
            }
            if let Some(first) = parts.first().filter(|_| peer.control_up) {
                peer.send_notice(token, first);
            }
        }
    }
}

impl Handler<SendAgain> for Transport {
    type Result = ();

    fn handle(&mut self, SendAgain(key, token): SendAgain, _: &mut Self::Context) {
        let next = self.next_token;
        let Some(peer) = self.peers.get_mut(&key).filter(|p| p.control_up) else {
            return;
        };
        // Another topology, or another connection, may have taken its place.
        if peer.notices.owed.as_ref().is_some_and(|o| o.token == token) {
            self.next_token += 1;
            peer.send_owed(next);
        }
    }
}

impl Attached {
    fn send_notice(&mut self, token: u64, message: &Kmp) {
        let sent = self.peer.send(Channel::Control, token, Kmp::clone(message));
        if sent.is_err() {
            return;
        }
        if self.notices.sent.len() == NOTICES_MAX
            && let Some(oldest) = self.notices.sent.pop_front()
        {
            self.on_wire.retain(|_, t| *t != oldest.token);
        }
        self.notices.sent.push_back(Sent {
            token,
            kind: message.msg_type(),
            expected: Expected::of(message),
        });
    }

    /// Sends the newest topology, or the part of it that is next, if it is owed.
    pub(super) fn send_owed(&mut self, token: u64) {
        if let Some(owed) = &mut self.notices.owed {
            owed.token = token;
            let (parts, at) = (Rc::clone(&owed.parts), owed.at);
            if let Some(part) = parts.get(at) {
                self.send_notice(token, part);
            }
        }
    }

    /// The answers to what was sent will not come. What was owed in parts begins anew.
    pub(super) fn forget_notices(&mut self) {
        self.notices.sent.clear();
        if let Some(owed) = &mut self.notices.owed {
            owed.at = 0;
        }
    }

    /// A message that cannot be put into a frame is owed to nobody.
    pub(super) fn give_up_notice(&mut self, token: u64) {
        self.notices.sent.retain(|sent| sent.token != token);
        self.notices.owed.take_if(|owed| owed.token == token);
    }

    /// What a survivor answered.
    pub(super) fn notice_answered(
        &mut self,
        key: &PeerKey,
        token: u64,
        result: Result<Kmp, RequestError>,
        log: &Logger,
        ctx: &mut Context<Transport>,
    ) {
        let sent = &mut self.notices.sent;
        let Some(at) = sent.iter().position(|sent| sent.token == token) else {
            return;
        };
        let Some(Sent { kind, expected, .. }) = sent.remove(at) else {
            return;
        };
        let log = log.new(
            o!("instance" => key.instance.clone(), "generation" => key.generation,
            "type" => kind.name()),
        );
        let owed = self.notices.owed.as_mut();
        let owed = owed.filter(|owed| owed.token == token);
        match (checked(result, expected), owed) {
            (Err(RequestError::Retry(after)), Some(owed)) => {
                owed.retries += 1;
                let random = getrandom::u64().unwrap_or(0);
                let wait = retry_wait(after, owed.retries, random);
                debug!(log, "a survivor put a message off"; "again_in_ms" => millis(wait));
                ctx.notify_later(SendAgain(key.clone(), token), wait);
            }
            (Ok(_), Some(owed)) if owed.at + 1 < owed.parts.len() => {
                (owed.at, owed.retries) = (owed.at + 1, 0);
                self.send_owed(token);
            }
            (result, owed) => {
                if owed.is_some() {
                    self.notices.owed = None;
                }
                match result {
                    Ok(_) => debug!(log, "a survivor was told"),
                    Err(error) => {
                        warn!(log, "a survivor did not take a message"; "reason" => %error)
                    }
                }
            }
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
