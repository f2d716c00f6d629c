//! Policies: how an instance is watched and healed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Shortest heartbeat timeout, seconds.
pub const POLICY_MIN_HEARTBEAT_S: f64 = 0.1;
/// Longest timeout of any kind, seconds.
pub const POLICY_MAX_TIMEOUT_S: f64 = 3600.0;

/// Whether the memory of an instance that failed is captured before it is given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmcorePolicy {
    /// It is not.
    #[default]
    Off,
    /// It is; when that fails, the instance is healed without.
    On,
    /// It is; when that fails, the memory is kept and an operator decides.
    Required,
}

impl VmcorePolicy {
    /// Its name in the API, in files and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Required => "required",
        }
    }
}

/// What a CPU means that runs nothing for the heartbeat timeout while the instance answers.
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
    /// Its name in the API, in files and on the command line.
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
    /// Silence, in seconds, after which the instance has failed: 0.1 to 3600. Production 1,
    /// development 60.
    #[schema(minimum = 0.1, maximum = 3600)]
    pub heartbeat_timeout_s: f64,
    /// Whether a failed instance is healed without being asked.
    pub auto_heal: bool,
    /// Longest time for one phase of a morph, in seconds: 1 to 3600.
    #[schema(minimum = 1, maximum = 3600)]
    pub morph_timeout_s: f64,
    /// Whether its memory is captured when it has failed. Nothing can be captured in `embedded`.
    #[serde(default)]
    pub vmcore: VmcorePolicy,
    /// What the instance is when one of its CPUs runs nothing for the heartbeat timeout.
    #[serde(default)]
    pub stuck_cpu: StuckCpuPolicy,
}

/// A change of one policy: what is absent stays.
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

/// The policies of several instances: what `policy export` writes (as TOML) and `policy import`
/// applies whole or not at all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicySet {
    /// By instance name.
    #[serde(default)]
    pub instance: BTreeMap<String, Policy>,
}

impl Policy {
    /// The key and the reason of the first value out of its range, if any.
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
