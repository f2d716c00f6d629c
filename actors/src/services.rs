//! What every actor needs: handed to each at its creation, so that none reaches for a global.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use actix::prelude::*;
use kmorph_backends::contract::{Backend, BackendKind, Placement};
use kmp_proto::auth::Key;
use kmp_proto::message::{Channel, Hello, HelloFixed, PeerRole, features};
use kmp_proto::wire::VERSION;
use kmp_transport::speaker::Speaker;
use slog::{Logger, o, warn};

use crate::aside::Turn;
use crate::events::EventLog;
use crate::forward::{Forwarder, Target};
use crate::journal::{GenerationRow, Journal};
use crate::morph::Downtimes;
use crate::operations::Operations;
use crate::pool::{Holder, Pool};
use crate::publish::Publisher;
use crate::release::Ledger;
use crate::settings::Settings;
use crate::transport::TransportHandle;
use crate::vmcore::Captures;

/// Lowest context id given to an instance: 0 to 2 are reserved (vsock(7)).
pub const CID_FIRST: u32 = 3;

/// Shared by the actors of one daemon. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Services {
    /// The log.
    pub log: Logger,
    /// The journal.
    pub journal: Addr<Journal>,
    /// Where instances run.
    pub backend: Arc<dyn Backend>,
    /// The connections.
    pub transport: TransportHandle,
    /// The event stream.
    pub events: EventLog,
    /// Long work.
    pub operations: Operations,
    /// Fenced generations that could not be released yet.
    pub kept: Ledger,
    /// CPUs and memory.
    pub pool: Rc<RefCell<Pool>>,
    /// Configuration in force.
    pub settings: Rc<RefCell<Settings>>,
    /// Published ports.
    pub publisher: Rc<RefCell<Publisher>>,
    /// Published ports of instances that cannot be passed their sockets.
    pub forwarder: Rc<RefCell<Forwarder>>,
    /// Numbers that only grow, or must not be given twice.
    pub numbers: Rc<RefCell<Numbers>>,
    /// What commits take on this machine.
    pub downtimes: Rc<RefCell<Downtimes>>,
    /// Captures of memory, one at a time.
    pub captures: Captures,
    /// Held while a process is started, where it may inherit sockets.
    pub spawn_turn: Turn,
    /// This daemon among those that had its state directory: it grows with each start.
    pub incarnation: u64,
    /// Boot id of the host, as the kernel gives it.
    pub host_boot_id: String,
}

/// Generations, recoveries, morph sessions, context ids.
#[derive(Debug, Default)]
pub struct Numbers {
    /// Last generation, by instance name.
    pub generations: BTreeMap<String, u64>,
    /// Last recovery.
    pub recovery: u64,
    /// Last morph session.
    pub session: u64,
    /// Context ids in use, and by which generation.
    pub cids: BTreeMap<u32, Holder>,
}

impl Numbers {
    /// The next generation of `instance`. It counts once its row is in the journal.
    pub fn next_generation(&mut self, instance: &str) -> u64 {
        let last = self.generations.entry(instance.to_owned()).or_default();
        *last += 1;
        *last
    }

    /// The next recovery.
    pub fn next_recovery(&mut self) -> u64 {
        self.recovery += 1;
        self.recovery
    }

    /// The next morph session.
    pub fn next_session(&mut self) -> u64 {
        self.session += 1;
        self.session
    }

    /// A context id that no live generation has, for `holder`.
    pub fn take_cid(&mut self, holder: Holder) -> u32 {
        let mut cid = CID_FIRST;
        while self.cids.contains_key(&cid) {
            cid += 1;
        }
        self.cids.insert(cid, holder);
        cid
    }

    /// Gives a context id back, unless another generation has it by now: a generation can be released twice.
    pub fn give_cid_back(&mut self, cid: u32, holder: &Holder) {
        if self.cids.get(&cid) == Some(holder) {
            self.cids.remove(&cid);
        }
    }
}

impl Services {
    /// Has the published ports of `instance` served on the host, where the backend cannot be passed
    /// the sockets. To be called when the publisher holds them.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn forward(&self, instance: &str) -> std::io::Result<()> {
        if self.backend.passes_sockets() || self.forwarder.borrow().has(instance) {
            return Ok(());
        }
        let held = self.publisher.borrow_mut().duplicates(instance)?;
        let listeners = held
            .into_iter()
            .map(|listener| (listener.port.port, listener.socket.into()))
            .collect();
        self.forwarder
            .borrow_mut()
            .open(instance, listeners, &self.log)
    }

    /// Lets connections to the published ports of `instance` go to `generation`, or wait.
    pub fn aim(&self, instance: &str, generation: Option<&GenerationRow>) {
        let target = generation.and_then(|row| {
            let placement = row.placement.as_ref()?;
            Some(Target {
                generation: row.generation,
                endpoint: placement.endpoint.clone(),
            })
        });
        self.forwarder.borrow().aim(instance, target);
    }

    /// Has the published ports of `instance` refuse connections, until a generation is given them again.
    pub fn refuse_ports(&self, instance: &str) {
        self.forwarder.borrow_mut().close(instance);
        self.publisher.borrow_mut().refuse(instance);
    }

    /// Gives the published ports of `instance` up.
    pub fn unpublish(&self, instance: &str) {
        self.forwarder.borrow_mut().close(instance);
        self.publisher.borrow_mut().close(instance);
    }

    /// The same, for what is done within a morph: its log lines say so.
    pub fn within(&self, session: u64) -> Self {
        Self {
            log: self.log.new(o!("session" => session)),
            ..self.clone()
        }
    }

    /// What this daemon has of the protocol's optional parts: bits of [`features`].
    fn features(&self) -> u64 {
        let of_backend = match self.backend.kind() {
            BackendKind::Embedded => features::BY_REFERENCE,
            BackendKind::Qemu => features::READS_LENT_MEMORY,
            BackendKind::Multikernel => 0,
        };
        features::MORPHS | of_backend
    }

    /// This daemon, as it speaks to a generation that was placed. Without the key that was kept at the spawn the
    /// agent refuses it, and says so.
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

    /// The daemon's HELLO to a generation of an instance.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_that_is_released_again_gives_no_other_ones_context_id_back() {
        let mut numbers = Numbers::default();
        let (first, second) = (("a".to_owned(), 1), ("b".to_owned(), 1));
        let cid = numbers.take_cid(first.clone());
        numbers.give_cid_back(cid, &first);
        assert_eq!(numbers.take_cid(second.clone()), cid);
        numbers.give_cid_back(cid, &first);
        assert_ne!(numbers.take_cid(first), cid);
        numbers.give_cid_back(cid, &second);
        assert_eq!(numbers.take_cid(second), cid);
    }
}
