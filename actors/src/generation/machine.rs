//! The machine that runs the generations, and the daemon's identity towards them.

use std::sync::Arc;

use kmorph_backends::contract::{Backend, Placement};
use kmp_proto::auth::Key;
use kmp_proto::message::{Channel, Hello, HelloFixed, PeerRole, features};
use kmp_proto::wire::VERSION;
use kmp_transport::speaker::Speaker;
use slog::{Logger, warn};

use crate::platform::aside::Turn;

/// The machine. Cheap to clone.
#[derive(Clone)]
pub struct Machine {
    /// The backend that runs generations.
    pub backend: Arc<dyn Backend>,
    /// Held during the start of a process that may inherit sockets.
    pub spawn_turn: Turn,
    /// Incarnation of this daemon; grows with each start on the same state directory.
    pub incarnation: u64,
    /// Boot id of the host, from the kernel.
    pub host_boot_id: String,
    /// The log.
    pub log: Logger,
}

impl Machine {
    /// Returns the optional protocol features of this daemon: bits of [`features`].
    fn features(&self) -> u64 {
        let mut bits = features::MORPHS;
        if self.backend.passes_sockets() {
            bits |= features::BY_REFERENCE;
        }
        if self.backend.kind().lends_memory() {
            bits |= features::READS_LENT_MEMORY;
        }
        bits
    }

    /// Returns this daemon as a peer of a placed generation. Without the key from the spawn, the agent refuses the
    /// daemon and reports that.
    pub fn speaker(&self, placement: &Placement) -> Speaker {
        let hello = self.hello(placement.name.as_str(), placement.generation);
        match kmorph_backends::key::of(placement) {
            Ok(secret) => Speaker::with_key(hello, Key::new(secret.bytes())),
            Err(error) => {
                warn!(self.log, "the key of a generation cannot be read";
                    "instance" => placement.name.as_str(), "generation" => placement.generation,
                    "error" => %error);
                hello.into()
            }
        }
    }

    /// Returns the daemon's HELLO to a generation of an instance.
    pub fn hello(&self, instance: &str, generation: u64) -> Hello {
        let mut boot_id = [0; 16];
        let digits: Vec<u8> = self.host_boot_id.bytes().filter(|b| *b != b'-').collect();
        for (byte, pair) in boot_id.iter_mut().zip(digits.chunks_exact(2)) {
            let text = core::str::from_utf8(pair).unwrap_or("0");
            *byte = u8::from_str_radix(text, 16).unwrap_or(0);
        }
        Hello {
            fixed: HelloFixed {
                version_min: VERSION,
                version_max: VERSION,
                role: PeerRole::Daemon,
                channel: Channel::Control,
                flags: 0,
                generation,
                boot_id,
                features: self.features(),
                session: 0,
                incarnation: self.incarnation,
            },
            instance: instance.to_owned(),
            kernel_release: String::new(),
            agent_version: concat!("kmorphd ", env!("CARGO_PKG_VERSION")).to_owned(),
            nonce: None,
            proof: None,
        }
    }
}
