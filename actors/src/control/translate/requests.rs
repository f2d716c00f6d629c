//! Requests, and the policies and programs that they contain.

use std::net::IpAddr;

use kmorph_control_api as api;
use kmorph_control_api::{ApiError, ErrorCode};

use crate::model::requests::{MorphRequest, PortRequest, SpawnRequest};
use crate::model::{
    POLICY_MAX_TIMEOUT_S, POLICY_MIN_HEARTBEAT_S, Policy, PolicyPatch, StuckCpuPolicy,
    VmcorePolicy, Workload,
};

// A client checks a policy against these limits before it sends the policy.
const _: () = assert!(
    api::POLICY_MIN_HEARTBEAT_S == POLICY_MIN_HEARTBEAT_S
        && api::POLICY_MAX_TIMEOUT_S == POLICY_MAX_TIMEOUT_S
);

impl TryFrom<api::SpawnRequest> for SpawnRequest {
    type Error = ApiError;

    fn try_from(request: api::SpawnRequest) -> Result<Self, ApiError> {
        let publish = request.publish.into_iter().map(PortRequest::try_from);
        Ok(Self {
            publish: publish.collect::<Result<_, _>>()?,
            name: request.name,
            kernel: request.kernel.into(),
            kernel_cmdline: request.kernel_cmdline,
            initramfs: request.initramfs.map(Into::into),
            cpus: request.cpus,
            memory_bytes: request.memory_bytes,
            workload: request.workload.map(Workload::from),
            monitor: request.monitor,
            heartbeat_timeout_s: request.heartbeat_timeout_s,
        })
    }
}

impl TryFrom<api::PublishRequest> for PortRequest {
    type Error = ApiError;

    fn try_from(request: api::PublishRequest) -> Result<Self, ApiError> {
        let address: IpAddr = request.address.parse().map_err(|_| {
            let text = format!("invalid IP address to publish on: {:?}", request.address);
            ApiError::new(ErrorCode::InvalidRequest, text).hint("use 127.0.0.1:6379:6379")
        })?;
        Ok(Self {
            address,
            host_port: request.host_port,
            port: request.port,
        })
    }
}

impl From<api::MorphRequest> for MorphRequest {
    fn from(request: api::MorphRequest) -> Self {
        Self {
            kernel: request.kernel.into(),
            kernel_cmdline: request.kernel_cmdline,
            initramfs: request.initramfs.map(Into::into),
            auto_validate: request.auto_validate,
            auto_commit: request.auto_commit,
            force: request.force,
            downtime_budget_us: request.downtime_budget_us,
        }
    }
}

impl From<api::WorkloadRequest> for Workload {
    fn from(request: api::WorkloadRequest) -> Self {
        Self {
            program: request.program,
            args: request.args,
            env: request.env,
            env_file: request.env_file,
        }
    }
}

impl From<Workload> for api::WorkloadRequest {
    fn from(workload: Workload) -> Self {
        Self {
            program: workload.program,
            args: workload.args,
            env: workload.env,
            env_file: workload.env_file,
        }
    }
}

impl From<api::VmcorePolicy> for VmcorePolicy {
    fn from(policy: api::VmcorePolicy) -> Self {
        match policy {
            api::VmcorePolicy::Off => Self::Off,
            api::VmcorePolicy::On => Self::On,
            api::VmcorePolicy::Required => Self::Required,
        }
    }
}

impl From<VmcorePolicy> for api::VmcorePolicy {
    fn from(policy: VmcorePolicy) -> Self {
        match policy {
            VmcorePolicy::Off => Self::Off,
            VmcorePolicy::On => Self::On,
            VmcorePolicy::Required => Self::Required,
        }
    }
}

impl From<api::StuckCpuPolicy> for StuckCpuPolicy {
    fn from(policy: api::StuckCpuPolicy) -> Self {
        match policy {
            api::StuckCpuPolicy::Degraded => Self::Degraded,
            api::StuckCpuPolicy::Failed => Self::Failed,
        }
    }
}

impl From<StuckCpuPolicy> for api::StuckCpuPolicy {
    fn from(policy: StuckCpuPolicy) -> Self {
        match policy {
            StuckCpuPolicy::Degraded => Self::Degraded,
            StuckCpuPolicy::Failed => Self::Failed,
        }
    }
}

impl From<Policy> for api::Policy {
    fn from(policy: Policy) -> Self {
        Self {
            heartbeat_timeout_s: policy.heartbeat_timeout_s,
            auto_heal: policy.auto_heal,
            morph_timeout_s: policy.morph_timeout_s,
            vmcore: policy.vmcore.into(),
            stuck_cpu: policy.stuck_cpu.into(),
        }
    }
}

impl From<api::PolicyPatch> for PolicyPatch {
    fn from(patch: api::PolicyPatch) -> Self {
        Self {
            heartbeat_timeout_s: patch.heartbeat_timeout_s,
            auto_heal: patch.auto_heal,
            morph_timeout_s: patch.morph_timeout_s,
            vmcore: patch.vmcore.map(Into::into),
            stuck_cpu: patch.stuck_cpu.map(Into::into),
        }
    }
}
