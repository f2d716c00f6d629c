//! Heartbeats and the health that an instance reports.

use super::{LayoutError, Payload, TEXT_MAX_BYTES, clip, fixed_only};
use crate::wire::Layout;
use crate::wire::field::{fixed, open_enum};
use crate::wire::record::{CPU_STALL, TEXT, append, once, records};

/// Value of a pressure field on a kernel without PSI.
pub const PRESSURE_ABSENT: u16 = u16::MAX;

open_enum! {
    /// The health that the agent reports for its instance.
    Health: u8 {
        /// All is well.
        Healthy = 1, "healthy";
        /// The instance works, but has a problem.
        Degraded = 2, "degraded";
        /// The instance does not do its work.
        Unhealthy = 3, "unhealthy";
    }
}

open_enum! {
    /// State of the instance's program.
    WorkloadState: u8 {
        /// The instance has no program.
        None = 0, "none";
        /// Being started.
        Starting = 1, "starting";
        /// Serving.
        Running = 2, "running";
        /// Waiting for its state: the target of a morph.
        Awaiting = 3, "awaiting_state";
        /// Frozen by a morph.
        Frozen = 4, "frozen";
        /// Ended by itself.
        Exited = 5, "exited";
        /// Failed too often, or could not be started.
        Failed = 6, "failed";
        /// Handed over: the source of a committed morph.
        Retired = 7, "retired";
    }
}

fixed! {
    /// HEARTBEAT_REQ.
    pub HeartbeatReq, 16 {
        /// Number of the probe, repeated in the answer.
        probe: u32 = 0,
        /// Unused, 0.
        flags: u32 = 4,
        /// Delay of the daemon itself, in microseconds: a hint for the agent's log.
        self_lag_us: u32 = 8,
        ; reserved 4
    }
}

fixed! {
    /// Fixed part of HEARTBEAT_RSP. The frame is 80 bytes without records.
    pub HeartbeatRspFixed, 48 {
        /// The answered probe.
        probe: u32 = 0,
        /// The health of the instance.
        health: Health = 4,
        /// State of its program.
        workload: WorkloadState = 5,
        /// Number of CPUs.
        cpu_count: u16 = 6,
        /// Busy CPU time since the last sample, 0 to 1000.
        cpu_busy_permille: u16 = 8,
        /// PSI `some avg10`, hundredths of a percent; [`PRESSURE_ABSENT`] if unknown.
        pressure_cpu: u16 = 10,
        /// The same for memory.
        pressure_memory: u16 = 12,
        /// The same for I/O.
        pressure_io: u16 = 14,
        /// Total memory, KiB.
        memory_total_kib: u64 = 16,
        /// Memory available without swapping, KiB.
        memory_available_kib: u64 = 24,
        /// Bytes read since boot.
        io_read_bytes: u64 = 32,
        /// Bytes written since boot.
        io_write_bytes: u64 = 40,
        ; reserved 0
    }
}

fixed_only!(HeartbeatReq);

fixed! {
    /// CPUs of the instance that execute nothing: a CPU_STALL record.
    pub CpuStall, 8 {
        /// The CPU that has executed nothing for the longest time.
        cpu: u16 = 0,
        /// Number of CPUs that execute nothing, including `cpu`.
        count: u16 = 2,
        /// Duration of the stall, in milliseconds.
        stalled_ms: u32 = 4,
        ; reserved 0
    }
}

/// HEARTBEAT_RSP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeartbeatRsp {
    /// Fixed part.
    pub fixed: HeartbeatRspFixed,
    /// CPUs that execute nothing, if any.
    pub stall: Option<CpuStall>,
}

impl From<HeartbeatRspFixed> for HeartbeatRsp {
    /// Returns an answer of an instance without stalled CPUs.
    fn from(fixed: HeartbeatRspFixed) -> Self {
        Self { fixed, stall: None }
    }
}

impl Payload for HeartbeatRsp {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = HeartbeatRspFixed::split(payload)?;
        let mut stall = None;
        for record in records(rest) {
            let record = record?;
            match record.kind {
                CPU_STALL => once(&mut stall, CpuStall::exact(record.bytes)?, CPU_STALL)?,
                _ => record.skip()?,
            }
        }
        Ok(Self { fixed, stall })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        if let Some(stall) = &self.stall {
            let mut bytes = Vec::new();
            stall.append(&mut bytes);
            append(out, CPU_STALL, 0, &bytes);
        }
    }
}

fixed! {
    /// Fixed part of HEALTH_STATUS.
    pub HealthStatusFixed, 16 {
        /// The health of the instance.
        health: Health = 0,
        /// State of its program.
        workload: WorkloadState = 1,
        /// Unused, 0.
        flags: u16 = 2,
        /// How the program ended: its exit status, or minus the signal.
        exit_status: i32 = 4,
        /// Number of restarts by the agent.
        restarts: u32 = 8,
        ; reserved 4
    }
}

/// HEALTH_STATUS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthStatus {
    /// Fixed part.
    pub fixed: HealthStatusFixed,
    /// Description for people.
    pub text: String,
}

impl Payload for HealthStatus {
    fn parse(payload: &[u8]) -> Result<Self, LayoutError> {
        let (fixed, rest) = HealthStatusFixed::split(payload)?;
        let text = text_record(rest)?;
        Ok(Self { fixed, text })
    }

    fn write(&self, out: &mut Vec<u8>) {
        self.fixed.append(out);
        append_text(out, &self.text);
    }
}

/// Returns the single TEXT record of a payload; empty if there is none.
pub(super) fn text_record(rest: &[u8]) -> Result<String, LayoutError> {
    let mut text = None;
    for record in records(rest) {
        let record = record?;
        match record.kind {
            TEXT => once(&mut text, record.text(TEXT_MAX_BYTES)?, TEXT)?,
            _ => record.skip()?,
        }
    }
    Ok(text.unwrap_or_default())
}

pub(super) fn append_text(out: &mut Vec<u8>, text: &str) {
    if !text.is_empty() {
        append(out, TEXT, 0, clip(text, TEXT_MAX_BYTES).as_bytes());
    }
}

pub(super) const LAYOUTS: &[(&str, Layout)] = &[
    ("HEARTBEAT_REQ", HeartbeatReq::LAYOUT),
    ("HEARTBEAT_RSP", HeartbeatRspFixed::LAYOUT),
    ("HEARTBEAT_RSP", CpuStall::LAYOUT),
    ("HEALTH_STATUS", HealthStatusFixed::LAYOUT),
];
