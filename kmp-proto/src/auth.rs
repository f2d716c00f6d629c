//! Authentication: the key of a generation, and the proofs of both ends that they have it.
//!
//! ```text
//!  daemon ── HELLO, nonce ─────────────────▶ instance
//!         ◀── reply, nonce, instance's proof ──
//!         ── AUTHENTICATE, daemon's proof ──▶
//!         ◀── reply ─────────────────────────
//! ```
//!
//! A proof covers all messages of both ends so far, and both nonces are new for each connection, so a proof
//! overheard on one connection is useless on another.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::message::{Hello, PeerRole};

/// Bytes of a key: 256 bits.
pub const KEY_BYTES: usize = 32;
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 32;
/// Bytes of a proof.
pub const PROOF_BYTES: usize = 32;

/// The key of one generation. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_BYTES]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// Creates a key from these bytes.
    pub const fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// Returns the proof that `side` has this key, for the connection of this HELLO and its reply.
    pub fn proof(&self, side: PeerRole, hello: &Hello, reply: &Hello) -> [u8; PROOF_BYTES] {
        self.mac(side, hello, reply).finalize().into_bytes().into()
    }

    /// Whether `proof` is the proof of `side`. Takes constant time.
    pub fn proves(
        &self,
        proof: &[u8; PROOF_BYTES],
        side: PeerRole,
        hello: &Hello,
        reply: &Hello,
    ) -> bool {
        self.mac(side, hello, reply).verify_slice(proof).is_ok()
    }

    fn mac(&self, side: PeerRole, hello: &Hello, reply: &Hello) -> Hmac<Sha256> {
        let label: &[u8; 16] = match side {
            PeerRole::Daemon => b"KMP1 daemon\0\0\0\0\0",
            PeerRole::Instance => b"KMP1 instance\0\0\0",
        };
        let mut said = label.to_vec();
        for hello in [hello, reply] {
            hello.fixed.append(&mut said);
            said.extend_from_slice(&hello.nonce.unwrap_or_default());
        }
        said.extend_from_slice(hello.instance.as_bytes());
        // HMAC pads a short key with zeros to a block (RFC 2104). The key is padded here, so that its length cannot be
        // invalid.
        let mut block = [0; 64];
        block[..KEY_BYTES].copy_from_slice(&self.0);
        let mut mac = <Hmac<Sha256> as KeyInit>::new(&block.into());
        mac.update(&said);
        mac
    }
}
