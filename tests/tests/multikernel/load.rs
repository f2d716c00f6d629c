//! A busy machine does not overload an instance: an emulated instance has no pressure figures of its own.

use kmorph_control_api::{HealthReport, InstanceState};

use super::host;

#[test]
fn an_emulated_instance_reports_no_pressure_of_the_machine_that_it_is_emulated_on() {
    let Some(host) = host() else { return };
    host.spawn_bare("web");
    let health = host.control().wait("its figures", || {
        let health: HealthReport = host.control().get("/v1/instances/web/health");
        health.metrics.is_some().then_some(health)
    });
    let figures = health.metrics.unwrap();
    assert_eq!(figures.cpu_pressure_percent, None, "{figures:?}");
    assert_eq!(figures.memory_pressure_percent, None, "{figures:?}");
    assert_eq!(figures.io_pressure_percent, None, "{figures:?}");
    assert_eq!(host.running("web").summary.state, InstanceState::Running);
}
