//! One end of a connection, byte by byte, and a daemon whose connections lead to such an end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kmp_proto::codec::{Decoder, Frame, encode};
use kmp_proto::message::{Channel, ErrorInfo, Message, PeerRole};
use kmp_transport::link::{BoxedLink, memory};
use kmp_transport::peer::{Connecting, Peer, PeerEvent};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::hello::hello;

/// Maximum wait for any event, in virtual time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3600);

/// One end of a link, byte by byte.
pub(crate) struct Raw {
    pub(crate) link: BoxedLink,
    decoder: Decoder,
}

impl Raw {
    pub(crate) fn new(link: BoxedLink) -> Self {
        let decoder = Decoder::new();
        Self { link, decoder }
    }

    pub(crate) async fn send(&mut self, message: &Message, sequence: u32) {
        let mut bytes = Vec::new();
        encode(message, sequence, 1, &mut bytes).unwrap();
        self.link.write_all(&bytes).await.unwrap();
    }

    /// Returns the next frame; `None` at the end of the link.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        let mut byte = [0];
        loop {
            let read = tokio::time::timeout(PATIENCE, self.link.read(&mut byte));
            if read.await.unwrap().unwrap() == 0 {
                return None;
            }
            if let Some(frame) = self.decoder.feed(&mut &byte[..]).unwrap() {
                return Some(frame);
            }
        }
    }

    pub(crate) async fn error(&mut self) -> ErrorInfo {
        match self.next().await.map(|frame| frame.message) {
            Some(Message::Error(error)) => error,
            other => panic!("{other:?}"),
        }
    }
}

/// A daemon's peer, and the instance's ends of its channels, one after the other.
pub(crate) struct Daemon {
    pub(crate) peer: Peer,
    events: mpsc::UnboundedReceiver<PeerEvent>,
    links: mpsc::UnboundedReceiver<BoxedLink>,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        let (told, events) = mpsc::unbounded_channel();
        let (links_in, links) = mpsc::unbounded_channel();
        let links_in = Arc::new(Mutex::new(links_in));
        let connector = Arc::new(move || -> Connecting {
            let (near, far) = memory();
            links_in.lock().unwrap().send(far).unwrap();
            Box::pin(async move { Ok(near) })
        });
        let sink = Arc::new(move |event| drop(told.send(event)));
        let peer = Peer::over(connector, hello(PeerRole::Daemon), 1, sink);
        Self {
            peer,
            events,
            links,
        }
    }

    /// Waits for the next connection of a channel, and drops connections of the other channel.
    pub(crate) async fn channel(&mut self, wanted: Channel) -> Raw {
        loop {
            let link = tokio::time::timeout(PATIENCE, self.links.recv());
            let mut raw = Raw::new(link.await.unwrap().unwrap());
            let asked = raw.next().await.unwrap();
            let Message::Hello(asked_hello) = asked.message else {
                panic!("{asked:?}");
            };
            if asked_hello.fixed.channel != wanted {
                continue;
            }
            let mut reply = hello(PeerRole::Instance);
            reply.fixed.channel = wanted;
            raw.send(&Message::HelloReply(reply), asked.header.sequence)
                .await;
            while !matches!(self.event().await, PeerEvent::Up(channel, _) if channel == wanted) {}
            return raw;
        }
    }

    pub(crate) async fn event(&mut self) -> PeerEvent {
        let event = tokio::time::timeout(PATIENCE, self.events.recv());
        event.await.unwrap().unwrap()
    }

    /// Waits until a channel goes down, and returns the reason.
    pub(crate) async fn down(&mut self, wanted: Channel) -> String {
        loop {
            match self.event().await {
                PeerEvent::Down(channel, why) if channel == wanted => return why,
                _ => {}
            }
        }
    }
}
