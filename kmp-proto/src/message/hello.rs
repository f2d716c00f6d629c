//! HELLO: the sender, its generation and its channel.

use super::{INSTANCE_ID_MAX_BYTES, LayoutError, Payload, clip, fixed_only, writable_id};
use crate::auth::{NONCE_BYTES, PROOF_BYTES};
use crate::wire::field::{code_enum, fixed};
use crate::wire::record::{
    AGENT_VERSION, CRITICAL, INSTANCE_ID, KERNEL_RELEASE, NONCE, PROOF, append, once, records,
};
use crate::wire::{ErrorCode, Layout, VERSION};

code_enum! {
    /// Role of the sender.
    PeerRole: u8 {
        /// kmorphd.
        Daemon = 1, "daemon";
        /// An instance's agent.
        Instance = 2, "instance";
    }
}

code_enum! {
    /// The purpose of a connection. Heartbeats never queue behind state.
    Channel: u8 {
        /// Heartbeats only.
        Heartbeat = 1, "heartbeat";
        /// Everything except heartbeats and bulk data.
        Control = 2, "control";
        /// One bulk transfer, of the given session.
        Bulk = 3, "bulk";
    }
}

/// Maximum length of a kernel release, and of a program's version, in bytes.
pub const SHORT_TEXT_MAX_BYTES: usize = 128;

/// Feature bits of [`HelloFixed::features`].
pub mod features {
    /// Supports MORPH_*. MORPH_NEGOTIATE lists the instance's providers.
    pub const MORPHS: u64 = 1;
    /// State can be handed over by reference.
    pub const BY_REFERENCE: u64 = 2;
    /// The instance can read lent memory of a fenced kernel: VMCORE_START.
    pub const READS_LENT_MEMORY: u64 = 4;
}

fixed! {
    /// Fixed part of HELLO.
    pub HelloFixed, 56 {
        /// Lowest supported protocol version.
        version_min: u16 = 0,
        /// Highest supported protocol version.
        version_max: u16 = 2,
        /// Role of the sender.
        role: PeerRole = 4,
        /// The purpose of the connection.
        channel: Channel = 5,
        /// Unused, 0.
        flags: u16 = 6,
        /// The generation: the daemon names the intended one, the instance its own.
        generation: u64 = 8,
        /// Random at every boot of the sender.
        boot_id: [u8; 16] = 16,
        /// See [`features`].
        features: u64 = 32,
        /// Session of a bulk channel, else 0.
        session: u64 = 40,
        /// From the daemon: a number that grows with each of its starts. From the instance: the highest number that it
        /// has seen.
        incarnation: u64 = 48,
        ; reserved 0
    }
}

/// HELLO, and its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Fixed part.
    pub fixed: HelloFixed,
    /// The instance: the daemon names the intended one, the instance its own.
    pub instance: String,
    /// Release of the sender's kernel.
    pub kernel_release: String,
    /// Version of the sender's program.
    pub agent_version: String,
    /// Random, new for each connection; absent on a connection without authentication.
    pub nonce: Option<[u8; NONCE_BYTES]>,
    /// In the reply: the instance's proof of the key.
    pub proof: Option<[u8; PROOF_BYTES]>,
}

fixed! {
    /// AUTHENTICATE.
    pub Authenticate, 32 {
        /// The daemon's proof of the key.
        proof: [u8; 32] = 0,
        ; reserved 0
    }
}

fixed! {
    /// Reply to AUTHENTICATE: the instance accepts the daemon.
    pub Authenticated, 8 {
        /// The newest incarnation of the daemon that the instance has seen: that of this daemon.
        incarnation: u64 = 0,
        ; reserved 0
    }
}

fixed_only!(Authenticate, Authenticated);

/// Returns a record of exactly 32 bytes.
fn bytes32(kind: u16, record: &[u8]) -> Result<[u8; 32], LayoutError> {
    record
        .try_into()
        .map_err(|_| LayoutError::WrongLength(kind))
}

impl Payload for Hello {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = HelloFixed::split(payload)?;
        fixed.session_fits()?;
        let (mut instance, mut kernel, mut agent) = (None, None, None);
        let (mut nonce, mut proof) = (None, None);
        for record in records(rest) {
            let record = record?;
            match record.kind {
                INSTANCE_ID => once(
                    &mut instance,
                    record.text(INSTANCE_ID_MAX_BYTES)?,
                    INSTANCE_ID,
                )?,
                KERNEL_RELEASE => once(
                    &mut kernel,
                    record.text(SHORT_TEXT_MAX_BYTES)?,
                    KERNEL_RELEASE,
                )?,
                AGENT_VERSION => once(
                    &mut agent,
                    record.text(SHORT_TEXT_MAX_BYTES)?,
                    AGENT_VERSION,
                )?,
                NONCE => once(&mut nonce, bytes32(NONCE, record.bytes)?, NONCE)?,
                PROOF => once(&mut proof, bytes32(PROOF, record.bytes)?, PROOF)?,
                _ => record.skip()?,
            }
        }
        Ok(Self {
            fixed,
            instance: instance.ok_or(LayoutError::MissingRecord(INSTANCE_ID))?,
            kernel_release: kernel.unwrap_or_default(),
            agent_version: agent.unwrap_or_default(),
            nonce,
            proof,
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
                append(out, kind, 0, clip(text, SHORT_TEXT_MAX_BYTES).as_bytes());
            }
        }
        for (kind, bytes) in [(NONCE, &self.nonce), (PROOF, &self.proof)] {
            if let Some(bytes) = bytes {
                append(out, kind, CRITICAL, bytes);
            }
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        self.fixed.session_fits()?;
        writable_id(&self.instance)
    }
}

impl HelloFixed {
    /// Checks that only a bulk channel has a session.
    fn session_fits(&self) -> Result<(), LayoutError> {
        match (self.channel, self.session) {
            (Channel::Bulk, 0) => Err(LayoutError::Contradiction("a bulk channel of session 0")),
            (Channel::Bulk, _) | (_, 0) => Ok(()),
            _ => Err(LayoutError::Contradiction(
                "a session on a channel that is not bulk",
            )),
        }
    }

    /// Returns whether the range of versions contains this side's version.
    fn speaks_our_version(&self) -> bool {
        (self.version_min..=self.version_max).contains(&VERSION)
    }
}

/// Why a HELLO, or its reply, is refused. The connection ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// No common version.
    #[error("it speaks versions {min} to {max}, this side speaks {VERSION}")]
    Version {
        /// The peer's lowest version.
        min: u16,
        /// The peer's highest version.
        max: u16,
    },
    /// The sender has the wrong role.
    #[error("it is {}, expected was {}", .found.as_str(), .expected.as_str())]
    Role {
        /// The expected role.
        expected: PeerRole,
        /// The role in the HELLO.
        found: PeerRole,
    },
    /// The HELLO names another instance.
    #[error("it is instance {found:?}, expected was {expected:?}")]
    Instance {
        /// The expected instance.
        expected: String,
        /// The instance in the HELLO.
        found: String,
    },
    /// The HELLO names another generation.
    #[error("it is generation {found}, expected was generation {expected}")]
    Generation {
        /// The expected generation.
        expected: u64,
        /// The generation in the HELLO.
        found: u64,
    },
    /// The reply is for another channel, or another session of it.
    #[error("it answers for the {} channel of session {session}", .channel.as_str())]
    OtherChannel {
        /// The channel in the reply.
        channel: Channel,
        /// The session in the reply.
        session: u64,
    },
    /// The proof of the generation's key is missing or wrong.
    #[error("it does not prove that it has the key of this generation")]
    NotAuthentic,
    /// The instance has accepted a newer daemon.
    #[error("it is daemon {found}, and {newest} has spoken to this instance")]
    OlderDaemon {
        /// The newest incarnation seen.
        newest: u64,
        /// The daemon's incarnation.
        found: u64,
    },
}

impl HelloError {
    /// Returns the error code of the answer.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Version { .. } => ErrorCode::UnsupportedVersion,
            Self::Generation { .. } => ErrorCode::StaleGeneration,
            Self::Role { .. } | Self::Instance { .. } | Self::OtherChannel { .. } => {
                ErrorCode::WrongPeer
            }
            Self::NotAuthentic => ErrorCode::NotAuthentic,
            Self::OlderDaemon { .. } => ErrorCode::OlderDaemon,
        }
    }
}

impl Hello {
    /// Performs the instance's checks of the daemon's HELLO, in their order; `self` is the instance.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn accept(&self, daemon: &Self) -> Result<(), HelloError> {
        daemon.is(PeerRole::Daemon, self)
    }

    /// Performs the daemon's checks of the reply to its own HELLO, in their order. `authentic` says whether the reply
    /// proves the key, if a proof is required.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn accept_reply(&self, reply: &Self, authentic: bool) -> Result<(), HelloError> {
        reply.is(PeerRole::Instance, self)?;
        if !authentic {
            return Err(HelloError::NotAuthentic);
        }
        let (channel, session) = (reply.fixed.channel, reply.fixed.session);
        if (channel, session) != (self.fixed.channel, self.fixed.session) {
            return Err(HelloError::OtherChannel { channel, session });
        }
        Ok(())
    }

    fn is(&self, expected: PeerRole, meant: &Self) -> Result<(), HelloError> {
        let fixed = &self.fixed;
        if !fixed.speaks_our_version() {
            let (min, max) = (fixed.version_min, fixed.version_max);
            return Err(HelloError::Version { min, max });
        }
        if fixed.role != expected {
            let found = fixed.role;
            return Err(HelloError::Role { expected, found });
        }
        if self.instance != meant.instance {
            return Err(HelloError::Instance {
                expected: meant.instance.clone(),
                found: self.instance.clone(),
            });
        }
        if fixed.generation != meant.fixed.generation {
            return Err(HelloError::Generation {
                expected: meant.fixed.generation,
                found: fixed.generation,
            });
        }
        Ok(())
    }
}

pub(super) const LAYOUTS: &[(&str, Layout)] = &[
    ("HELLO", HelloFixed::LAYOUT),
    ("AUTHENTICATE", Authenticate::LAYOUT),
    ("AUTHENTICATE", Authenticated::LAYOUT),
];
