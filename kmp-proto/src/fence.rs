//! The proof that a generation has ended.
//!
//! ```text
//! engine action ──▶ FenceOrder ──(backend stops it and sees its end)──▶ FenceCertificate
//! ```
//!
//! An order can be carried out once: it is not `Clone`, and [`FenceOrder::confirm`] consumes it. The only other
//! source of a certificate is the journal, when it restores the proof of an earlier daemon. Nothing is reclaimed,
//! restarted or taken over without a certificate.

use crate::message::FenceClaim;
use crate::wire::field::code_enum;

code_enum! {
    /// How a generation was stopped.
    FenceMethod: u16 {
        /// No action: the generation had ended by itself.
        AlreadyEnded = 1, "already_ended";
        /// Its processes were killed.
        ProcessesKilled = 2, "processes_killed";
        /// The host has rebooted since.
        HostRebooted = 3, "host_rebooted";
        /// The generation was never started.
        NeverStarted = 4, "never_started";
        /// The CPUs of its kernel were stopped.
        HaltedByForce = 5, "halted_by_force";
    }
}

code_enum! {
    /// How the end of a generation was confirmed.
    Confirmation: u16 {
        /// The kernel reported the end of all its processes (pidfd), and a scan found no other process.
        ProcessesGone = 1, "processes_gone";
        /// The host's boot id differs from the boot id under which the generation was started.
        OtherHostBoot = 2, "other_host_boot";
        /// A search found no started parts of the generation.
        NothingFound = 3, "nothing_found";
        /// The host's kernel has waited until each CPU of the generation had stopped.
        CpusParked = 4, "cpus_parked";
    }
}

/// The order to stop one generation for good.
#[derive(Debug, PartialEq, Eq)]
pub struct FenceOrder {
    generation: u64,
}

/// The durable record that a generation can no longer run or do I/O.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceCertificate {
    generation: u64,
    method: FenceMethod,
    confirmation: Confirmation,
    fenced_at_unix_ns: u64,
}

impl FenceOrder {
    /// Orders the end of `generation`. Any code may order a fence: to stop a generation is always
    /// safe, only to assume its stop is not.
    pub fn new(generation: u64) -> Self {
        Self { generation }
    }

    /// Returns the generation to stop.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Certifies that the order was carried out. Only for backends, which observe the end.
    pub fn confirm(
        self,
        method: FenceMethod,
        confirmation: Confirmation,
        fenced_at_unix_ns: u64,
    ) -> FenceCertificate {
        FenceCertificate {
            generation: self.generation,
            method,
            confirmation,
            fenced_at_unix_ns,
        }
    }
}

impl FenceCertificate {
    /// Restores a certificate that an earlier daemon wrote to its journal. Returns `None` for names
    /// that no version of kmorph has written.
    pub fn restore_from_journal(
        generation: u64,
        method: &str,
        confirmation: &str,
        fenced_at_unix_ns: u64,
    ) -> Option<Self> {
        let method = FenceMethod::ALL
            .iter()
            .copied()
            .find(|m| m.as_str() == method)?;
        let confirmation = Confirmation::ALL
            .iter()
            .copied()
            .find(|c| c.as_str() == confirmation)?;
        Some(Self {
            generation,
            method,
            confirmation,
            fenced_at_unix_ns,
        })
    }

    /// Returns the generation that has ended.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns the method.
    pub fn method(&self) -> FenceMethod {
        self.method
    }

    /// Returns the observation that confirms it.
    pub fn confirmation(&self) -> Confirmation {
        self.confirmation
    }

    /// Returns the time of the fence, nanoseconds since the Unix epoch.
    pub fn fenced_at_unix_ns(&self) -> u64 {
        self.fenced_at_unix_ns
    }

    /// Returns the claim sent to survivors.
    pub fn claim(&self) -> FenceClaim {
        FenceClaim {
            method: self.method.value(),
            confirmation: self.confirmation.value(),
            flags: 0,
            generation: self.generation,
            fenced_at_unix_ns: self.fenced_at_unix_ns,
        }
    }
}
