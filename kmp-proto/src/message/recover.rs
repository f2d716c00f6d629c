//! RECOVER_*: notifications to the survivors of a failure.

use super::heartbeat::append_text;
use super::{
    INSTANCE_ID_MAX_BYTES, LayoutError, Payload, TEXT_MAX_BYTES, at_most, fixed_only, writable_id,
};
use crate::wire::Layout;
use crate::wire::field::{fixed, open_enum};
use crate::wire::record::{
    CRITICAL, FENCE_CERTIFICATE, INSTANCE_ID, TEXT, TOPOLOGY, append, once, records,
};

/// Maximum number of instances in one topology.
pub(super) const TOPOLOGY_MAX_ENTRIES: usize = 2048;
/// Maximum number of CPUs of one instance in a topology.
const TOPOLOGY_MAX_CPUS: usize = 1024;

open_enum! {
    /// The cause of a failure.
    FailureCause: u16 {
        /// The kernel has ended or does not run.
        KernelDead = 1, "kernel_dead";
        /// The kernel runs, its agent does not.
        AgentDead = 2, "agent_dead";
        /// An operator requested the recovery.
        Operator = 3, "operator";
        /// Kernel and agent run, the workload never did.
        WorkloadFailed = 4, "workload_failed";
    }
}

open_enum! {
    /// The result of a recovery.
    RecoveryOutcome: u16 {
        /// A healthy successor runs.
        Recovered = 1, "recovered";
        /// There is no successor; the resources have returned to the pool.
        Reclaimed = 2, "reclaimed";
    }
}

fixed! {
    /// Fixed part of RECOVER_PREPARE and RECOVER_RECLAIM.
    pub RecoverFixed, 24 {
        /// Number of the recovery.
        recovery: u64 = 0,
        /// The generation that failed.
        failed_generation: u64 = 8,
        /// The cause of the failure.
        cause: FailureCause = 16,
        ; reserved 6
    }
}

fixed! {
    /// A fence certificate as a peer claims it: information, not a proof.
    pub FenceClaim, 32 {
        /// Number of `fence::FenceMethod`.
        method: u16 = 0,
        /// Number of `fence::Confirmation`.
        confirmation: u16 = 2,
        /// Unused, 0.
        flags: u32 = 4,
        /// The fenced generation.
        generation: u64 = 8,
        /// Time of the fence, nanoseconds since the Unix epoch, by the daemon's clock.
        fenced_at_unix_ns: u64 = 16,
        ; reserved 8
    }
}

fixed! {
    /// Fixed part of RECOVER_COMPLETE.
    pub RecoverCompleteFixed, 32 {
        /// Number of the recovery.
        recovery: u64 = 0,
        /// The generation that failed.
        failed_generation: u64 = 8,
        /// Its successor; 0 if there is none.
        new_generation: u64 = 16,
        /// The result.
        outcome: RecoveryOutcome = 24,
        /// Index of this frame among the parts of the message, from 0.
        part: u16 = 26,
        /// See [`complete_flags`].
        flags: u16 = 28,
        ; reserved 2
    }
}

/// Bits of [`RecoverCompleteFixed::flags`].
pub mod complete_flags {
    /// The topology continues in the next part.
    pub const MORE: u16 = 1;
}

/// Bytes of a record's header.
pub(super) const RECORD_HEADER_BYTES: usize = 8;

fixed! {
    /// Reply to each of the three messages.
    pub RecoverReply, 16 {
        /// Number of the recovery.
        recovery: u64 = 0,
        /// Time that the survivor needed, milliseconds.
        elapsed_ms: u32 = 8,
        ; reserved 4
    }
}

fixed! {
    /// Fixed part of a TOPOLOGY record.
    TopologyFixed, 32 {
        generation: u64 = 0,
        memory_kib: u64 = 8,
        cid: u64 = 16,
        cpu_count: u16 = 24,
        name_len: u16 = 26,
        ; reserved 4
    }
}

fixed_only!(RecoverReply);

/// RECOVER_PREPARE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverNotice {
    /// Fixed part.
    pub fixed: RecoverFixed,
    /// The instance that failed.
    pub instance: String,
    /// The evidence.
    pub text: String,
}

/// RECOVER_RECLAIM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverReclaim {
    /// Fixed part.
    pub fixed: RecoverFixed,
    /// The instance that failed.
    pub instance: String,
    /// How its end was confirmed.
    pub fence: FenceClaim,
}

/// RECOVER_COMPLETE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverComplete {
    /// Fixed part.
    pub fixed: RecoverCompleteFixed,
    /// The instance that failed.
    pub instance: String,
    /// All current instances.
    pub topology: Vec<TopologyEntry>,
}

/// One instance of the topology.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopologyEntry {
    /// Its name.
    pub name: String,
    /// The generation that serves.
    pub generation: u64,
    /// Its memory, KiB.
    pub memory_kib: u64,
    /// Its vsock context id.
    pub cid: u64,
    /// Its CPUs.
    pub cpus: Vec<u16>,
}

fn instance_record(out: &mut Vec<u8>, instance: &str) {
    append(out, INSTANCE_ID, CRITICAL, instance.as_bytes());
}

impl Payload for RecoverNotice {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = RecoverFixed::split(payload)?;
        let (mut instance, mut text) = (None, None);
        for record in records(rest) {
            let record = record?;
            match record.kind {
                INSTANCE_ID => once(
                    &mut instance,
                    record.text(INSTANCE_ID_MAX_BYTES)?,
                    INSTANCE_ID,
                )?,
                TEXT => once(&mut text, record.text(TEXT_MAX_BYTES)?, TEXT)?,
                _ => record.skip()?,
            }
        }
        let instance = instance.ok_or(LayoutError::MissingRecord(INSTANCE_ID))?;
        Ok(Self {
            fixed,
            instance,
            text: text.unwrap_or_default(),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        instance_record(out, &self.instance);
        append_text(out, &self.text);
    }

    fn writable(&self) -> Result<(), LayoutError> {
        writable_id(&self.instance)
    }
}

impl Payload for RecoverReclaim {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = RecoverFixed::split(payload)?;
        let (mut instance, mut fence) = (None, None);
        for record in records(rest) {
            let record = record?;
            match record.kind {
                INSTANCE_ID => once(
                    &mut instance,
                    record.text(INSTANCE_ID_MAX_BYTES)?,
                    INSTANCE_ID,
                )?,
                FENCE_CERTIFICATE => {
                    once(
                        &mut fence,
                        FenceClaim::exact(record.bytes)?,
                        FENCE_CERTIFICATE,
                    )?;
                }
                _ => record.skip()?,
            }
        }
        let instance = instance.ok_or(LayoutError::MissingRecord(INSTANCE_ID))?;
        let fence = fence.ok_or(LayoutError::MissingRecord(FENCE_CERTIFICATE))?;
        Ok(Self {
            fixed,
            instance,
            fence,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        instance_record(out, &self.instance);
        let mut claim = Vec::with_capacity(FenceClaim::BYTES);
        self.fence.append(&mut claim);
        append(out, FENCE_CERTIFICATE, CRITICAL, &claim);
    }

    fn writable(&self) -> Result<(), LayoutError> {
        writable_id(&self.instance)
    }
}

impl Payload for RecoverComplete {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = RecoverCompleteFixed::split(payload)?;
        let (mut instance, mut topology) = (None, Vec::new());
        for record in records(rest) {
            let record = record?;
            match record.kind {
                INSTANCE_ID => once(
                    &mut instance,
                    record.text(INSTANCE_ID_MAX_BYTES)?,
                    INSTANCE_ID,
                )?,
                TOPOLOGY if topology.len() == TOPOLOGY_MAX_ENTRIES => {
                    return Err(LayoutError::TooMany(TOPOLOGY_MAX_ENTRIES));
                }
                TOPOLOGY => topology.push(TopologyEntry::parse(record.bytes)?),
                _ => record.skip()?,
            }
        }
        let instance = instance.ok_or(LayoutError::MissingRecord(INSTANCE_ID))?;
        Ok(Self {
            fixed,
            instance,
            topology,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        instance_record(out, &self.instance);
        for entry in &self.topology {
            entry.append(out);
        }
    }

    fn writable(&self) -> Result<(), LayoutError> {
        writable_id(&self.instance)?;
        at_most(self.topology.len(), TOPOLOGY_MAX_ENTRIES)?;
        for entry in &self.topology {
            writable_id(&entry.name)?;
            at_most(entry.cpus.len(), TOPOLOGY_MAX_CPUS)?;
        }
        Ok(())
    }
}

impl TopologyEntry {
    fn parse(bytes: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = TopologyFixed::split(bytes)?;
        if usize::from(fixed.cpu_count) > TOPOLOGY_MAX_CPUS {
            return Err(LayoutError::TooMany(TOPOLOGY_MAX_CPUS));
        }
        let (cpus, name) = (
            usize::from(fixed.cpu_count) * 2,
            usize::from(fixed.name_len),
        );
        if rest.len() != cpus + name || name > INSTANCE_ID_MAX_BYTES {
            return Err(LayoutError::Inconsistent);
        }
        let (cpus, name) = rest.split_at(cpus);
        let name = core::str::from_utf8(name).map_err(|_| LayoutError::NotText)?;
        Ok(Self {
            name: name.to_owned(),
            generation: fixed.generation,
            memory_kib: fixed.memory_kib,
            cid: fixed.cid,
            cpus: cpus
                .chunks_exact(2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
                .collect(),
        })
    }

    /// Returns the size of the entry in a payload, bytes.
    pub(super) fn record_bytes(&self) -> usize {
        let bytes = TopologyFixed::BYTES + self.cpus.len() * 2 + self.name.len();
        RECORD_HEADER_BYTES + bytes.next_multiple_of(8)
    }

    fn append(&self, out: &mut Vec<u8>) {
        let name = &self.name;
        let cpus = &self.cpus;
        let mut bytes = Vec::with_capacity(TopologyFixed::BYTES + cpus.len() * 2 + name.len());
        TopologyFixed {
            generation: self.generation,
            memory_kib: self.memory_kib,
            cid: self.cid,
            cpu_count: u16::try_from(cpus.len()).unwrap_or(0),
            name_len: u16::try_from(name.len()).unwrap_or(0),
        }
        .append(&mut bytes);
        bytes.extend(cpus.iter().flat_map(|c| c.to_le_bytes()));
        bytes.extend_from_slice(name.as_bytes());
        append(out, TOPOLOGY, 0, &bytes);
    }
}

pub(super) const LAYOUTS: &[(&str, Layout)] = &[
    ("RECOVER_PREPARE", RecoverFixed::LAYOUT),
    ("RECOVER_PREPARE", RecoverReply::LAYOUT),
    ("RECOVER_RECLAIM", RecoverFixed::LAYOUT),
    ("RECOVER_RECLAIM", FenceClaim::LAYOUT),
    ("RECOVER_COMPLETE", RecoverCompleteFixed::LAYOUT),
    ("RECOVER_COMPLETE", TopologyFixed::LAYOUT),
];
