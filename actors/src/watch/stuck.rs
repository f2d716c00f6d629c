//! Adds a stuck CPU to the health that the agent reports.

use kmp_proto::detector::StuckCpus;
use kmp_proto::message::{Health, HealthStatus, HealthStatusFixed, HeartbeatRsp};

/// Returns the health to report when the agent has reported `status`: a stuck CPU makes it at least degraded.
pub(super) fn on_top(mut status: HealthStatus, stuck: Option<&StuckCpus>) -> HealthStatus {
    let Some(stuck) = stuck else {
        return status;
    };
    let said = std::mem::take(&mut status.text);
    status.text = match status.fixed.health {
        Health::Healthy => stuck.to_string(),
        _ if said.is_empty() => stuck.to_string(),
        _ => format!("{stuck}; {said}"),
    };
    if status.fixed.health == Health::Healthy {
        status.fixed.health = Health::Degraded;
    }
    status
}

/// Returns the health in an answer, for an agent that has not reported any yet.
pub(super) fn unsaid(answer: &HeartbeatRsp) -> HealthStatus {
    HealthStatus {
        fixed: HealthStatusFixed {
            health: answer.fixed.health,
            workload: answer.fixed.workload,
            flags: 0,
            exit_status: 0,
            restarts: 0,
        },
        text: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kmp_proto::message::WorkloadState;

    use super::*;

    #[test]
    fn a_stuck_cpu_is_told_before_what_the_agent_says_and_hides_none_of_it() {
        let status = |health, text: &str| HealthStatus {
            fixed: HealthStatusFixed {
                health,
                workload: WorkloadState::Running,
                flags: 0,
                exit_status: 0,
                restarts: 2,
            },
            text: text.to_owned(),
        };
        let stuck = StuckCpus {
            cpu: 1,
            others: 0,
            stalled: Duration::from_secs(2),
        };
        let cpu = "CPU 1 is stuck: it has run nothing for 2.0s";
        for (health, text, told_health, told_text) in [
            (Health::Healthy, "", Health::Degraded, cpu.to_owned()),
            (
                Health::Healthy,
                "up again",
                Health::Degraded,
                cpu.to_owned(),
            ),
            (
                Health::Unhealthy,
                "down",
                Health::Unhealthy,
                format!("{cpu}; down"),
            ),
        ] {
            let told = on_top(status(health, text), Some(&stuck));
            assert_eq!(told, status(told_health, &told_text));
        }
        let said = status(Health::Degraded, "it ended");
        assert_eq!(on_top(said.clone(), None), said);
    }
}
