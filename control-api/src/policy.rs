//! Policies: how an instance is monitored and recovered.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Minimum heartbeat timeout, seconds.
pub const POLICY_MIN_HEARTBEAT_S: f64 = 0.1;
/// Maximum of every timeout, seconds.
pub const POLICY_MAX_TIMEOUT_S: f64 = 3600.0;

/// Whether the memory of a failed instance is captured before it is released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmcorePolicy {
    /// Do not capture.
    #[default]
    Off,
    /// Capture; if the capture fails, recover the instance without a vmcore.
    On,
    /// Capture; if the capture fails, keep the memory until an operator decides.
    Required,
}

impl VmcorePolicy {
    /// Returns its name in the API, in files and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Required => "required",
        }
    }
}

/// The state of an instance that answers while one of its CPUs executes nothing for the heartbeat timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StuckCpuPolicy {
    /// The instance is degraded.
    #[default]
    Degraded,
    /// The instance has failed.
    Failed,
}

impl StuckCpuPolicy {
    /// Returns its name in the API, in files and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        }
    }
}

/// The policy of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Silence, in seconds, after which the instance is declared failed: 0.1 to 3600. Suggested: 1 in production, 60
    /// in development.
    #[schema(minimum = 0.1, maximum = 3600)]
    pub heartbeat_timeout_s: f64,
    /// Whether a failed instance is recovered automatically.
    pub auto_heal: bool,
    /// Time limit for each phase of a morph, in seconds: 1 to 3600.
    #[schema(minimum = 1, maximum = 3600)]
    pub morph_timeout_s: f64,
    /// Whether the instance's memory is captured after a failure. `embedded` cannot capture memory.
    #[serde(default)]
    pub vmcore: VmcorePolicy,
    /// State of an instance that answers while one of its CPUs executes nothing for the heartbeat timeout.
    #[serde(default)]
    pub stuck_cpu: StuckCpuPolicy,
}

/// A change of one policy: absent values stay unchanged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyPatch {
    /// See [`Policy::heartbeat_timeout_s`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0.1, maximum = 3600)]
    pub heartbeat_timeout_s: Option<f64>,
    /// See [`Policy::auto_heal`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_heal: Option<bool>,
    /// See [`Policy::morph_timeout_s`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 3600)]
    pub morph_timeout_s: Option<f64>,
    /// See [`Policy::vmcore`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmcore: Option<VmcorePolicy>,
    /// See [`Policy::stuck_cpu`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck_cpu: Option<StuckCpuPolicy>,
}

impl From<Policy> for PolicyPatch {
    fn from(whole: Policy) -> Self {
        Self {
            heartbeat_timeout_s: Some(whole.heartbeat_timeout_s),
            auto_heal: Some(whole.auto_heal),
            morph_timeout_s: Some(whole.morph_timeout_s),
            vmcore: Some(whole.vmcore),
            stuck_cpu: Some(whole.stuck_cpu),
        }
    }
}

/// The policies of several instances: `policy export` writes them as TOML, and `policy import` applies them
/// completely or not at all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicySet {
    /// By instance name.
    #[serde(default)]
    pub instance: BTreeMap<String, Policy>,
}

impl Policy {
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
