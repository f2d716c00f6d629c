//! Configuration of the failure detector for an instance's generations.

use std::time::Duration;

use crate::model::StuckCpuPolicy;
use kmp_proto::detector::Config;

use crate::model::rows::InstanceRow;
use crate::model::settings::Settings;

/// Timeout of an instance spawned with `--monitor=false`.
const UNMONITORED_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Returns the detector's configuration for an instance, from its policy and its monitor flag.
pub fn detector_config(settings: &Settings, instance: &InstanceRow) -> Config {
    let policy = &instance.policy;
    let timeout =
        Duration::try_from_secs_f64(policy.heartbeat_timeout_s).unwrap_or(Duration::from_secs(60));
    let mut config = Config::new(timeout, settings.start_timeout);
    config.stuck_cpu_fails = policy.stuck_cpu == StuckCpuPolicy::Failed;
    if !instance.spec.monitor {
        // The detector still sees the start and exit events, but tolerates a year of silence.
        config.timeout = UNMONITORED_TIMEOUT;
    }
    config
}
