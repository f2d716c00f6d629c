//! Records of the journal: operations, morphs, recoveries, captures, self-tests, events.

use kmorph_control_api as api;
use serde::Serialize;

use super::each;
use crate::model::{
    CaptureReport, Check, DoctorReport, DowntimeSteps, Event, EventKind, MorphPhase, MorphRecord,
    Operation, OperationKind, OperationResult, OperationState, OtherProvider, Progress,
    RecoveryOutcome, RecoveryRecord, VmcoreRecord,
};

impl From<OperationKind> for api::OperationKind {
    fn from(kind: OperationKind) -> Self {
        match kind {
            OperationKind::Spawn => Self::Spawn,
            OperationKind::Terminate => Self::Terminate,
            OperationKind::Recover => Self::Recover,
            OperationKind::MorphPrepare => Self::MorphPrepare,
            OperationKind::MorphValidate => Self::MorphValidate,
            OperationKind::MorphCommit => Self::MorphCommit,
            OperationKind::MorphRollback => Self::MorphRollback,
            OperationKind::Morph => Self::Morph,
            OperationKind::VmcoreCapture => Self::VmcoreCapture,
            OperationKind::Doctor => Self::Doctor,
        }
    }
}

impl From<OperationState> for api::OperationState {
    fn from(state: OperationState) -> Self {
        match state {
            OperationState::Running => Self::Running,
            OperationState::Succeeded => Self::Succeeded,
            OperationState::Failed => Self::Failed,
            OperationState::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Progress> for api::Progress {
    fn from(progress: Progress) -> Self {
        Self {
            step: progress.step,
            done: progress.done,
            total: progress.total,
            unit: progress.unit,
        }
    }
}

/// Returns a result in the API's format. Serialization of these types does not fail.
fn json<T: Serialize>(shown: T) -> serde_json::Value {
    serde_json::to_value(shown).unwrap_or_default()
}

fn result(result: OperationResult) -> serde_json::Value {
    match result {
        OperationResult::Running { name } => {
            serde_json::json!({ "name": name, "state": api::InstanceState::Running })
        }
        OperationResult::Morph(morph) => json(api::MorphStatus::from(*morph)),
        OperationResult::Recovery(recovery) => json(api::RecoveryRecord::from(*recovery)),
        OperationResult::Capture(capture) => json(api::CaptureReport::from(*capture)),
        OperationResult::Doctor(doctor) => json(api::DoctorReport::from(*doctor)),
    }
}

impl From<Operation> for api::Operation {
    fn from(operation: Operation) -> Self {
        Self {
            id: operation.id,
            kind: operation.kind.into(),
            instance: operation.instance,
            state: operation.state.into(),
            revision: operation.revision,
            progress: operation.progress.into(),
            requested_by: operation.requested_by,
            started_at: operation.started_at,
            ended_at: operation.ended_at,
            error: operation.error.map(Into::into),
            result: operation.result.map(result),
        }
    }
}

impl From<MorphPhase> for api::MorphPhase {
    fn from(phase: MorphPhase) -> Self {
        match phase {
            MorphPhase::Preparing => Self::Preparing,
            MorphPhase::Negotiating => Self::Negotiating,
            MorphPhase::Transferring => Self::Transferring,
            MorphPhase::Validating => Self::Validating,
            MorphPhase::Committable => Self::Committable,
            MorphPhase::Committing => Self::Committing,
            MorphPhase::RollingBack => Self::RollingBack,
            MorphPhase::Committed => Self::Committed,
            MorphPhase::RolledBack => Self::RolledBack,
            MorphPhase::Failed => Self::Failed,
        }
    }
}

impl From<OtherProvider> for api::OtherProvider {
    fn from(other: OtherProvider) -> Self {
        Self {
            provider: other.provider,
            reason: other.reason,
        }
    }
}

impl From<Check> for api::Check {
    fn from(check: Check) -> Self {
        Self {
            name: check.name,
            passed: check.passed,
            duration_us: check.duration_us,
            detail: check.detail,
        }
    }
}

impl From<DowntimeSteps> for api::DowntimeSteps {
    fn from(steps: DowntimeSteps) -> Self {
        Self {
            freeze_us: steps.freeze_us,
            final_delta_us: steps.final_delta_us,
            activate_us: steps.activate_us,
            record_us: steps.record_us,
            serve_us: steps.serve_us,
            total_us: steps.total_us,
        }
    }
}

impl From<MorphRecord> for api::MorphStatus {
    fn from(morph: MorphRecord) -> Self {
        Self {
            instance: morph.instance,
            session: morph.session,
            operation: morph.operation,
            phase: morph.phase.into(),
            from_generation: morph.from_generation,
            to_generation: morph.to_generation,
            from_kernel: morph.from_kernel,
            to_kernel: morph.to_kernel,
            provider: morph.provider,
            other_providers: each(morph.other_providers),
            mode: morph.mode,
            state_bytes: morph.state_bytes,
            sent_bytes: morph.sent_bytes,
            rounds: morph.rounds,
            checks: each(morph.checks),
            downtime_budget_us: morph.downtime_budget_us,
            estimated_downtime_us: morph.estimated_downtime_us,
            expires_at: morph.expires_at,
            downtime: morph.downtime.map(Into::into),
            reason: morph.reason,
            started_at: morph.started_at,
            ended_at: morph.ended_at,
        }
    }
}

impl From<RecoveryOutcome> for api::RecoveryOutcome {
    fn from(outcome: RecoveryOutcome) -> Self {
        match outcome {
            RecoveryOutcome::Running => Self::Running,
            RecoveryOutcome::Recovered => Self::Recovered,
            RecoveryOutcome::Failed => Self::Failed,
            RecoveryOutcome::Quarantined => Self::Quarantined,
            RecoveryOutcome::OperatorActionNeeded => Self::OperatorActionNeeded,
        }
    }
}

impl From<VmcoreRecord> for api::VmcoreRecord {
    fn from(vmcore: VmcoreRecord) -> Self {
        Self {
            path: vmcore.path,
            bytes: vmcore.bytes,
            captured_ms: vmcore.captured_ms,
            not_filtered: vmcore.not_filtered,
            read_by: vmcore.read_by,
            error: vmcore.error,
            log_path: vmcore.log_path,
            log_ms: vmcore.log_ms,
            panic: vmcore.panic,
            log_error: vmcore.log_error,
        }
    }
}

impl From<RecoveryRecord> for api::RecoveryRecord {
    fn from(recovery: RecoveryRecord) -> Self {
        Self {
            id: recovery.id,
            instance: recovery.instance,
            failed_generation: recovery.failed_generation,
            new_generation: recovery.new_generation,
            cause: recovery.cause,
            evidence: recovery.evidence,
            fence: recovery.fence,
            vmcore: recovery.vmcore.map(Into::into),
            outcome: recovery.outcome.into(),
            reason: recovery.reason,
            started_at: recovery.started_at,
            ended_at: recovery.ended_at,
            fence_ms: recovery.fence_ms,
            total_ms: recovery.total_ms,
        }
    }
}

impl From<CaptureReport> for api::CaptureReport {
    fn from(capture: CaptureReport) -> Self {
        Self {
            name: capture.name,
            generation: capture.generation,
            path: capture.path,
            bytes: capture.bytes,
            not_filtered: capture.not_filtered,
            read_by: capture.read_by,
            panic: capture.panic,
            log_error: capture.log_error,
            frozen_ms: capture.frozen_ms,
            total_ms: capture.total_ms,
        }
    }
}

impl From<DoctorReport> for api::DoctorReport {
    fn from(doctor: DoctorReport) -> Self {
        Self {
            ended_at: doctor.ended_at,
            passed: doctor.passed,
            reason: doctor.reason,
            kernel_path: doctor.kernel_path,
            kernel_release: doctor.kernel_release,
            panic: doctor.panic,
            vmcore_bytes: doctor.vmcore_bytes,
            cpus: doctor.cpus,
            log_ms: doctor.log_ms,
            captured_ms: doctor.captured_ms,
            recovered_ms: doctor.recovered_ms,
        }
    }
}

impl From<EventKind> for api::EventKind {
    fn from(kind: EventKind) -> Self {
        match kind {
            EventKind::InstanceState => Self::InstanceState,
            EventKind::Detector => Self::Detector,
            EventKind::Recovery => Self::Recovery,
            EventKind::Morph => Self::Morph,
            EventKind::Operation => Self::Operation,
            EventKind::Policy => Self::Policy,
            EventKind::Ports => Self::Ports,
            EventKind::Resources => Self::Resources,
            EventKind::Vmcore => Self::Vmcore,
            EventKind::Daemon => Self::Daemon,
            EventKind::Gap => Self::Gap,
        }
    }
}

impl From<Event> for api::Event {
    fn from(event: Event) -> Self {
        Self {
            id: event.id,
            at: event.at,
            kind: event.kind.into(),
            instance: event.instance,
            generation: event.generation,
            message: event.message,
            detail: event.detail,
        }
    }
}
