//! HELLO: who speaks, for which generation, on which channel.

use super::{INSTANCE_ID_MAX_BYTES, LayoutError, Payload, TEXT_MAX_BYTES, clip, writable_id};
use crate::wire::Layout;
use crate::wire::field::{code_enum, fixed};
use crate::wire::record::{
    AGENT_VERSION, CRITICAL, INSTANCE_ID, KERNEL_RELEASE, append, once, records,
};

code_enum! {
    /// Which side speaks.
    PeerRole: u8 {
        /// kmorphd.
        Daemon = 1, "daemon";
        /// An instance's agent.
        Instance = 2, "instance";
    }
}

code_enum! {
    /// What a connection is for. A heartbeat never queues behind state.
    Channel: u8 {
        /// Heartbeats only.
        Heartbeat = 1, "heartbeat";
        /// Everything that is not a heartbeat or bulk.
        Control = 2, "control";
        /// One bulk transfer, of the session named.
        Bulk = 3, "bulk";
    }
}

/// Feature bits of [`HelloFixed::features`].
pub mod features {
    /// The instance's workload takes part in morphs (state provider `cooperative`).
    pub const COOPERATIVE: u64 = 1;
    /// State can be handed over by reference.
    pub const BY_REFERENCE: u64 = 2;
    /// The instance reads memory of a fenced kernel that it is lent: VMCORE_START.
    pub const READS_LENT_MEMORY: u64 = 4;
}

fixed! {
    /// Fixed part of HELLO.
    pub HelloFixed, 56 {
        /// Lowest protocol version spoken.
        version_min: u16 = 0,
        /// Highest protocol version spoken.
        version_max: u16 = 2,
        /// Which side speaks.
        role: PeerRole = 4,
        /// What the connection is for.
        channel: Channel = 5,
        /// Unused, 0.
        flags: u16 = 6,
        /// The generation: the daemon names the one it means, the instance the one it is.
        generation: u64 = 8,
        /// Random at every boot of the sender.
        boot_id: [u8; 16] = 16,
        /// See [`features`].
        features: u64 = 32,
        /// Session of a bulk channel, else 0.
        session: u64 = 40,
        ; reserved 8
    }
}

/// HELLO, and its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Fixed part.
    pub fixed: HelloFixed,
    /// The instance: the daemon names the one it means, the instance the one it is.
    pub instance: String,
    /// Release of the sender's kernel.
    pub kernel_release: String,
    /// Version of the sender's program.
    pub agent_version: String,
}

impl Payload for Hello {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = HelloFixed::split(payload)?;
        let (mut instance, mut kernel, mut agent) = (None, None, None);
        for record in records(rest) {
            let record = record?;
            match record.kind {
                INSTANCE_ID => once(
                    &mut instance,
                    record.text(INSTANCE_ID_MAX_BYTES)?,
                    INSTANCE_ID,
                )?,
                KERNEL_RELEASE => once(&mut kernel, record.text(TEXT_MAX_BYTES)?, KERNEL_RELEASE)?,
                AGENT_VERSION => once(&mut agent, record.text(TEXT_MAX_BYTES)?, AGENT_VERSION)?,
                _ => record.skip()?,
            }
        }
        Ok(Self {
            fixed,
            instance: instance.ok_or(LayoutError::MissingRecord(INSTANCE_ID))?,
            kernel_release: kernel.unwrap_or_default(),
            agent_version: agent.unwrap_or_default(),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        append(out, INSTANCE_ID, CRITICAL, self.instance.as_bytes());
        for (kind, text) in [
            (KERNEL_RELEASE, &self.kernel_release),
            (AGENT_VERSION, &self.agent_version),
        ] {
            if !text.is_empty() {
                append(out, kind, 0, clip(text, 128).as_bytes());
            }
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        writable_id(&self.instance)
    }
}

pub(super) const LAYOUTS: &[(&str, Layout)] = &[("HELLO", HelloFixed::LAYOUT)];
