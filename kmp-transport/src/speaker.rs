//! The identity of one end of a connection: its HELLO, and the key that proves it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kmp_proto::auth::{Key, NONCE_BYTES};
use kmp_proto::message::{Hello, HelloError, PeerRole};

/// One end's HELLO and key. Clones share what they have seen.
#[derive(Clone, Debug)]
pub struct Speaker {
    hello: Hello,
    /// None: nothing is proved, nor asked to be. For port 9001, and for tests of other things.
    key: Option<Key>,
    /// Instance: the newest incarnation of a daemon that has proved itself here.
    newest: Arc<AtomicU64>,
}

impl Speaker {
    /// A speaker that authenticates with `key`, and requires the same of the other end.
    pub fn with_key(hello: Hello, key: Key) -> Self {
        Self {
            key: Some(key),
            ..Self::from(hello)
        }
    }

    /// Its HELLO; on the wire it has a nonce too.
    pub const fn hello(&self) -> &Hello {
        &self.hello
    }

    pub(crate) const fn hello_mut(&mut self) -> &mut Hello {
        &mut self.hello
    }

    pub(crate) const fn key(&self) -> Option<&Key> {
        self.key.as_ref()
    }

    /// Daemon: the HELLO of a new connection.
    pub(crate) fn ask(&self) -> io::Result<Hello> {
        let mut hello = self.hello.clone();
        if self.key.is_some() {
            hello.nonce = Some(nonce()?);
        }
        Ok(hello)
    }

    /// Instance: the checks of a daemon's HELLO, in their order.
    pub(crate) fn accept(&self, daemon: &Hello) -> Result<(), HelloError> {
        self.hello.accept(daemon)?;
        if self.key.is_none() {
            return Ok(());
        }
        self.not_older(daemon, self.newest.load(Ordering::Relaxed))?;
        daemon.nonce.map(drop).ok_or(HelloError::NotAuthentic)
    }

    /// Instance: the reply to a HELLO that was accepted.
    pub(crate) fn reply(&self, daemon: &Hello) -> io::Result<Hello> {
        let mut reply = self.hello.clone();
        reply.fixed.channel = daemon.fixed.channel;
        reply.fixed.session = daemon.fixed.session;
        reply.fixed.incarnation = self.newest.load(Ordering::Relaxed);
        if let Some(key) = &self.key {
            reply.nonce = Some(nonce()?);
            reply.proof = Some(key.proof(PeerRole::Instance, daemon, &reply));
        }
        Ok(reply)
    }

    /// Instance: a daemon has proved itself. Another one may have, since its HELLO was accepted.
    pub(crate) fn saw(&self, daemon: &Hello) -> Result<u64, HelloError> {
        let found = daemon.fixed.incarnation;
        let newest = self.newest.fetch_max(found, Ordering::Relaxed);
        self.not_older(daemon, newest)?;
        Ok(found)
    }

    fn not_older(&self, daemon: &Hello, newest: u64) -> Result<(), HelloError> {
        let found = daemon.fixed.incarnation;
        if found < newest {
            return Err(HelloError::OlderDaemon { newest, found });
        }
        Ok(())
    }
}

impl From<Hello> for Speaker {
    fn from(hello: Hello) -> Self {
        Self {
            hello,
            key: None,
            newest: Arc::default(),
        }
    }
}

impl From<&Hello> for Speaker {
    fn from(hello: &Hello) -> Self {
        hello.clone().into()
    }
}

impl From<&Speaker> for Speaker {
    fn from(speaker: &Speaker) -> Self {
        speaker.clone()
    }
}

fn nonce() -> io::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(nonce)
}
