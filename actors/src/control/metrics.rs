//! Prometheus text: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use std::fmt::Write;

use actix_web::body::BoxBody;
use actix_web::{HttpRequest, HttpResponse, Responder, web};
use kmorph_control_api::{ApiError, DaemonStatus, InstanceState, InstanceSummary};
use serde_json::{Value, json};

use super::Api;
use super::answers::{actor_gone, response};
use super::endpoint::{Endpoint, Gives, Schemas, get, media};
use super::translate::each;
use crate::platform::wall_clock;
use crate::supervisor::{GetDaemon, List};

pub(super) fn endpoints() -> Vec<Endpoint> {
    vec![get("/metrics", "Figures for Prometheus", show_metrics)]
}

/// The text or the refusal.
struct Exposition(Result<String, ApiError>);

impl Responder for Exposition {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        match self.0 {
            Ok(text) => HttpResponse::Ok()
                .content_type("text/plain; version=0.0.4")
                .body(text),
            Err(error) => response(&error),
        }
    }
}

impl Gives for Exposition {
    fn describe(_: &mut Schemas) -> Value {
        media("text/plain", json!({ "type": "string" }))
    }
}

async fn show_metrics(api: web::Data<Api>) -> Exposition {
    let asked = async {
        let daemon = api.supervisor.send(GetDaemon).await.map_err(actor_gone)?;
        let instances = api.supervisor.send(List).await.map_err(actor_gone)?;
        Ok(render(&daemon.into(), &each(instances)))
    };
    Exposition(asked.await)
}

fn render(daemon: &DaemonStatus, instances: &[InstanceSummary]) -> String {
    let mut text = String::new();
    let mut head = |name: &str, kind: &str, help: &str, lines: &mut dyn FnMut(&mut String)| {
        // A write to a String does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        lines(&mut text);
    };
    let mut gauge = |name: &str, help: &str, value: f64| {
        head(name, "gauge", help, &mut |out| {
            let _ = writeln!(out, "{name} {value}");
        });
    };
    gauge(
        "kmorph_up_seconds",
        "Seconds since the daemon started.",
        daemon.uptime_s as f64,
    );
    gauge(
        "kmorph_pool_memory_free_bytes",
        "Memory not given to an instance.",
        daemon.pool.memory_free_bytes as f64,
    );
    gauge(
        "kmorph_operations_running",
        "Operations under way.",
        f64::from(daemon.operations_running),
    );
    gauge(
        "kmorph_actor_restarts",
        "Actors replaced after a panic.",
        daemon.actor_restarts as f64,
    );
    if let Some(doctor) = &daemon.last_doctor {
        gauge(
            "kmorph_self_test_passed",
            "1 when the last self-test passed.",
            if doctor.passed { 1.0 } else { 0.0 },
        );
        gauge(
            "kmorph_self_test_age_seconds",
            "Time since it ended.",
            wall_clock::seconds_since(&doctor.ended_at) as f64,
        );
    }
    head(
        "kmorph_instance_state",
        "gauge",
        "1 for the state that the instance is in.",
        &mut |out| {
            for i in instances {
                // Use the API's format: a state is a word.
                let state = serde_json::to_value(i.state).unwrap_or_default();
                let state = state.as_str().unwrap_or("unknown");
                let _ = writeln!(
                    out,
                    "kmorph_instance_state{{instance=\"{}\",state=\"{state}\"}} 1",
                    i.name
                );
            }
        },
    );
    let mut family =
        |name: &str, kind: &str, help: &str, value: &dyn Fn(&InstanceSummary) -> Option<f64>| {
            head(name, kind, help, &mut |out| {
                for i in instances {
                    if let Some(value) = value(i) {
                        let _ = writeln!(out, "{name}{{instance=\"{}\"}} {value}", i.name);
                    }
                }
            });
        };
    family(
        "kmorph_instance_up",
        "gauge",
        "1 when the instance answers heartbeats.",
        &|i| {
            let up = matches!(
                i.state,
                InstanceState::Running | InstanceState::Degraded | InstanceState::Morphing
            );
            Some(if up { 1.0 } else { 0.0 })
        },
    );
    family(
        "kmorph_instance_generation",
        "gauge",
        "Its generation.",
        &|i| Some(i.generation as f64),
    );
    family(
        "kmorph_instance_recoveries_total",
        "counter",
        "Recoveries.",
        &|i| Some(i.recoveries as f64),
    );
    family(
        "kmorph_instance_workload_failures_total",
        "counter",
        "Failures of its program that its agent mended by starting it again.",
        &|i| Some(i.workload_failures as f64),
    );
    family(
        "kmorph_instance_morphs_total",
        "counter",
        "Committed morphs.",
        &|i| Some(i.morphs as f64),
    );
    family(
        "kmorph_instance_heartbeat_age_seconds",
        "gauge",
        "Time since its last heartbeat.",
        &|i| i.last_heartbeat_ms.map(|ms| ms as f64 / 1000.0),
    );
    text
}
