//! Policies: how the daemon watches and heals an instance.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Minimum heartbeat timeout, seconds.
pub const POLICY_MIN_HEARTBEAT_S: f64 = 0.1;
/// Maximum of every timeout, seconds.
pub const POLICY_MAX_TIMEOUT_S: f64 = 3600.0;

/// Whether the daemon captures the memory of a failed instance before it releases it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmcorePolicy {
    /// No capture.
    #[default]
    Off,
    /// Capture; if that fails, heal the instance without a vmcore.
    On,
    /// Capture; if that fails, keep the memory until an operator decides.
    Required,
}

impl VmcorePolicy {
    /// Returns its name in configuration, messages and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Required => "required",
        }
    }
}

/// The effect of a stuck CPU: one that schedules no task for the heartbeat timeout while the instance still answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StuckCpuPolicy {
    /// The instance is degraded.
    #[default]
    Degraded,
    /// The instance has failed.
    Failed,
}

impl StuckCpuPolicy {
    /// Returns its name in configuration, messages and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        }
    }
}

/// The policy of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Silence, in seconds, after which the instance has failed: 0.1 to 3600. Use 1 in production, 60 in development.
    pub heartbeat_timeout_s: f64,
    /// Whether the daemon heals a failed instance automatically.
    pub auto_heal: bool,
    /// Maximum time for one phase of a morph, in seconds: 1 to 3600.
    pub morph_timeout_s: f64,
    /// Whether the daemon captures the memory of the instance after a failure. `embedded` has nothing to capture.
    #[serde(default)]
    pub vmcore: VmcorePolicy,
    /// The state of the instance when one of its CPUs is stuck for the heartbeat timeout.
    #[serde(default)]
    pub stuck_cpu: StuckCpuPolicy,
}

/// A change of one policy: absent fields keep their value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyPatch {
    /// See [`Policy::heartbeat_timeout_s`].
    pub heartbeat_timeout_s: Option<f64>,
    /// See [`Policy::auto_heal`].
    pub auto_heal: Option<bool>,
    /// See [`Policy::morph_timeout_s`].
    pub morph_timeout_s: Option<f64>,
    /// See [`Policy::vmcore`].
    pub vmcore: Option<VmcorePolicy>,
    /// See [`Policy::stuck_cpu`].
    pub stuck_cpu: Option<StuckCpuPolicy>,
}

impl Policy {
    /// Returns the maximum time for one phase of a morph; one minute if the policy's value is not a valid duration.
    pub fn morph_timeout(&self) -> Duration {
        Duration::try_from_secs_f64(self.morph_timeout_s).unwrap_or(Duration::from_secs(60))
    }

    /// Returns the key of the first value that is out of range, and the reason.
    pub fn fault(&self) -> Option<(&'static str, String)> {
        let within = |v: f64, low: f64| v.is_finite() && (low..=POLICY_MAX_TIMEOUT_S).contains(&v);
        let say = |v: f64, low: f64| {
            format!("{v} is not a number of seconds from {low} to {POLICY_MAX_TIMEOUT_S}")
        };
        if !within(self.heartbeat_timeout_s, POLICY_MIN_HEARTBEAT_S) {
            let reason = say(self.heartbeat_timeout_s, POLICY_MIN_HEARTBEAT_S);
            return Some(("heartbeat_timeout_s", reason));
        }
        if !within(self.morph_timeout_s, 1.0) {
            return Some(("morph_timeout_s", say(self.morph_timeout_s, 1.0)));
        }
        None
    }

    /// Returns this policy with a patch applied.
    #[must_use]
    pub fn patched(&self, patch: &PolicyPatch) -> Self {
        Self {
            heartbeat_timeout_s: patch
                .heartbeat_timeout_s
                .unwrap_or(self.heartbeat_timeout_s),
            auto_heal: patch.auto_heal.unwrap_or(self.auto_heal),
            morph_timeout_s: patch.morph_timeout_s.unwrap_or(self.morph_timeout_s),
            vmcore: patch.vmcore.unwrap_or(self.vmcore),
            stuck_cpu: patch.stuck_cpu.unwrap_or(self.stuck_cpu),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_named() {
        let good = Policy {
            heartbeat_timeout_s: 1.0,
            auto_heal: true,
            morph_timeout_s: 60.0,
            vmcore: VmcorePolicy::On,
            stuck_cpu: StuckCpuPolicy::Failed,
        };
        assert_eq!(good.fault(), None);
        for bad in [0.0, -1.0, 0.05, 3601.0, f64::NAN, f64::INFINITY] {
            let policy = Policy {
                heartbeat_timeout_s: bad,
                ..good.clone()
            };
            assert_eq!(policy.fault().unwrap().0, "heartbeat_timeout_s");
            let policy = Policy {
                morph_timeout_s: bad,
                ..good.clone()
            };
            assert_eq!(policy.fault().unwrap().0, "morph_timeout_s");
        }
    }
}
