//! Commands that show instances: list, status, heartbeat, health.

use kmorph_control_api::address::path;
use kmorph_control_api::{
    HealthReport, HeartbeatStatus, InstanceState, InstanceStatus, InstanceSummary, Metrics,
    PortState, PublishedAddress,
};
use serde_json::Value;

use crate::cli::{HealthArgs, MetricGroup};
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::{age_ms, age_s, bytes, cpu_list, local_time, micros, seconds};
use crate::output::{LastColumn, Output, Tone, Word};

/// Returns an instance's state as a word for people.
pub(super) fn state_word(state: InstanceState) -> Word {
    use InstanceState as S;
    let (text, tone) = match state {
        S::Starting => ("STARTING", Tone::Warning),
        S::Running => ("RUNNING", Tone::Good),
        S::Degraded => ("DEGRADED", Tone::Warning),
        S::Unresponsive => ("UNRESPONSIVE", Tone::Bad),
        S::Failed => ("FAILED", Tone::Bad),
        S::Recovering => ("RECOVERING", Tone::Warning),
        S::Morphing => ("MORPHING", Tone::Warning),
        S::Terminating => ("TERMINATING", Tone::Warning),
        S::Quarantined => ("QUARANTINED", Tone::Bad),
        S::OperatorActionNeeded => ("OPERATOR ACTION NEEDED", Tone::Bad),
    };
    Word::toned(text, tone)
}

fn or_dash(text: String) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

/// Returns the uptime of the generation; a dash if nothing of it runs.
fn uptime(summary: &InstanceSummary) -> String {
    or_dash(summary.uptime_s.map(age_s).unwrap_or_default())
}

/// Returns a published port, with its state unless it accepts connections.
fn published(port: &PublishedAddress, arrow: &str) -> String {
    let route = format!("{}{arrow}{}", port.listen, port.port);
    match (port.state, &port.reason) {
        (PortState::Open, _) => route,
        (state, None) => format!("{route} ({})", state.as_str()),
        (state, Some(reason)) => format!("{route} ({}: {reason})", state.as_str()),
    }
}

fn ago(last_ms: Option<u64>) -> String {
    last_ms.map_or_else(|| "never".to_owned(), |ms| format!("{} ago", age_ms(ms)))
}

/// Returns the time since the last heartbeat of an instance. A restarted daemon does not know it for an instance
/// that failed before.
fn last_heard(summary: &InstanceSummary, unknown: &str) -> String {
    match (summary.last_heartbeat_ms, summary.state) {
        (None, state) if state != InstanceState::Starting => unknown.to_owned(),
        (last_ms, _) => ago(last_ms),
    }
}

pub(super) async fn list(
    client: &Client,
    out: &mut Output,
    verbose: bool,
) -> Result<Exit, Failure> {
    let answer = client
        .get::<Vec<InstanceSummary>>(&path(&["instances"]))
        .await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let mut header = vec![
        "NAME",
        "STATE",
        "KERNEL",
        "CPUS",
        "MEMORY",
        "HEARTBEAT",
        "UPTIME",
    ];
    if verbose {
        header.extend(["GENERATION", "BACKEND", "RECOVERIES", "MORPHS", "PUBLISHED"]);
    }
    let row = |instance: InstanceSummary| {
        let (uptime, heard) = (uptime(&instance), last_heard(&instance, "-"));
        let mut row: Vec<Word> = vec![
            instance.name.into(),
            state_word(instance.state),
            or_dash(instance.kernel_release).into(),
            cpu_list(&instance.cpus).into(),
            bytes(instance.memory_bytes).into(),
            heard.into(),
            uptime.into(),
        ];
        if verbose {
            let ports = instance.published.iter();
            let ports: Vec<String> = ports.map(|p| published(p, "->")).collect();
            row.extend([
                instance.generation.to_string().into(),
                instance.backend.into(),
                instance.recoveries.to_string().into(),
                instance.morphs.to_string().into(),
                Word::from(or_dash(ports.join(" "))),
            ]);
        }
        row
    };
    let rows = answer.value.into_iter().map(row).collect();
    out.table(&header, rows, LastColumn::Words, "No instances")?;
    Ok(Exit::Ok)
}

pub(super) async fn status(client: &Client, out: &mut Output, name: &str) -> Result<Exit, Failure> {
    let answer = client
        .get::<InstanceStatus>(&path(&["instances", name]))
        .await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let status = answer.value;
    let summary = &status.summary;
    let state = out.paint(&state_word(summary.state));
    out.fields(&[
        ("Instance", summary.name.clone().into()),
        (
            "Running kernel",
            or_dash(summary.kernel_release.clone()).into(),
        ),
    ])?;
    out.raw(&format!(
        "Status: {state} (last heartbeat: {})",
        last_heard(summary, "not known")
    ))?;
    out.fields(&status_fields(&status))?;
    Ok(Exit::Ok)
}

fn status_fields(status: &InstanceStatus) -> Vec<(&'static str, Word)> {
    let summary = &status.summary;
    let mut fields: Vec<(&'static str, Word)> = Vec::new();
    let mut add = |label, text: String| fields.push((label, text.into()));
    if let Some(reason) = &status.reason {
        add("Reason", reason.clone());
    }
    for kept in &status.kept {
        add("Not given back", super::kept(kept));
    }
    if let Some(operation) = &status.operation {
        add("Operation", operation.clone());
    }
    let since = local_time(&status.created_at);
    add("Created", since);
    add(
        "Generation",
        match summary.uptime_s {
            Some(seconds) => format!("{}, up {}", summary.generation, age_s(seconds)),
            None => format!("{}, not running", summary.generation),
        },
    );
    add("History", history(summary));
    add("CPUs", cpu_list(&summary.cpus));
    add("Memory", bytes(summary.memory_bytes));
    match &status.workload {
        Some(workload) => {
            let mut words = vec![workload.program.clone()];
            words.extend(workload.args.iter().cloned());
            add(
                "Workload",
                format!("{} ({})", words.join(" "), status.workload_state),
            );
        }
        None => add("Workload", "none".to_owned()),
    }
    for port in &summary.published {
        add("Published", published(port, " -> "));
    }
    add(
        "Kernel image",
        format!("{} (sha256 {})", status.kernel_path, status.kernel_sha256),
    );
    if !status.kernel_cmdline.is_empty() {
        add("Kernel command line", status.kernel_cmdline.clone());
    }
    add("Policy", policy_text(&status.policy));
    let pids: Vec<String> = status
        .processes
        .iter()
        .map(|(role, pid)| format!("{role} {pid}"))
        .collect();
    add("Processes", or_dash(pids.join(", ")));
    add(
        "Backend",
        format!("{}, CID {}", summary.backend, status.cid),
    );
    add("Directory", status.run_dir.clone());
    fields
}

fn history(summary: &InstanceSummary) -> String {
    let recoveries = match summary.recoveries {
        1 => "1 recovery".to_owned(),
        many => format!("{many} recoveries"),
    };
    let morphs = match summary.morphs {
        1 => "1 morph".to_owned(),
        many => format!("{many} morphs"),
    };
    let failures = match summary.workload_failures {
        0 => return format!("{recoveries}, {morphs}"),
        1 => "1 restart of its workload".to_owned(),
        many => format!("{many} restarts of its workload"),
    };
    format!("{recoveries}, {morphs}, {failures}")
}

fn policy_text(policy: &kmorph_control_api::Policy) -> String {
    format!(
        "heartbeat timeout {}, auto-heal {}, morph timeout {}, vmcore {}, stuck CPU {}",
        seconds(policy.heartbeat_timeout_s),
        if policy.auto_heal {
            "enabled"
        } else {
            "disabled"
        },
        seconds(policy.morph_timeout_s),
        policy.vmcore.as_str(),
        policy.stuck_cpu.as_str()
    )
}

pub(super) async fn heartbeat(
    client: &Client,
    out: &mut Output,
    name: &str,
) -> Result<Exit, Failure> {
    let answer = client
        .get::<HeartbeatStatus>(&path(&["instances", name, "heartbeat"]))
        .await?;
    if out.is_json() {
        out.json(&answer.raw)?;
        return Ok(Exit::Ok);
    }
    let heartbeat = answer.value;
    let tone = match heartbeat.detector.as_str() {
        "monitoring" => Tone::Good,
        "failed" => Tone::Bad,
        _ => Tone::Warning,
    };
    let detector = match heartbeat.monitored {
        true => Word::toned(heartbeat.detector.replace('_', " "), tone),
        false => "not monitored".into(),
    };
    let trip = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), micros);
    out.fields(&[
        ("Instance", heartbeat.name.into()),
        ("Detector", detector),
        ("Last heartbeat", ago(heartbeat.last_answer_ms).into()),
        ("Timeout", age_ms(heartbeat.timeout_ms).into()),
        ("Interval", age_ms(heartbeat.interval_ms).into()),
        ("Sent", heartbeat.sent.to_string().into()),
        ("Answered", heartbeat.answered.to_string().into()),
        (
            "Missed in a row",
            heartbeat.missed_in_a_row.to_string().into(),
        ),
        (
            "Transient failures",
            heartbeat.transient_failures.to_string().into(),
        ),
        ("Last round trip", trip(heartbeat.last_rtt_us).into()),
        (
            "Smoothed round trip",
            trip(heartbeat.smoothed_rtt_us).into(),
        ),
    ])?;
    Ok(Exit::Ok)
}

pub(super) async fn health(
    client: &Client,
    out: &mut Output,
    args: &HealthArgs,
) -> Result<Exit, Failure> {
    let answer = client
        .get::<HealthReport>(&path(&["instances", &args.name, "health"]))
        .await?;
    if out.is_json() {
        out.json(&only_groups(answer.raw, &args.metrics))?;
        return Ok(Exit::Ok);
    }
    let report = answer.value;
    let tone = match report.health.as_str() {
        "healthy" => Tone::Good,
        "unknown" => Tone::Warning,
        _ => Tone::Bad,
    };
    let mut fields: Vec<(&str, Word)> = vec![
        ("Instance", report.name.into()),
        ("Status", state_word(report.state)),
        ("Health", Word::toned(report.health, tone)),
    ];
    if let Some(reason) = report.reason {
        fields.push(("Reason", reason.into()));
    }
    fields.push(("Workload", report.workload_state.into()));
    match &report.metrics {
        Some(metrics) => {
            fields.push(("Figures", ago(report.age_ms).into()));
            for group in &args.metrics {
                fields.extend(metric_fields(*group, metrics));
            }
        }
        None => fields.push(("Figures", "none yet".into())),
    }
    out.fields(&fields)?;
    Ok(Exit::Ok)
}

fn metric_fields(group: MetricGroup, metrics: &Metrics) -> Vec<(&'static str, Word)> {
    let pressure = |percent: Option<f64>| {
        let shown = percent.map(|percent| format!("{percent:.2} %"));
        Word::from(shown.unwrap_or_else(|| "not reported by its kernel".to_owned()))
    };
    match group {
        MetricGroup::Cpu => vec![
            ("CPU count", metrics.cpu_count.to_string().into()),
            (
                "CPU busy",
                format!("{:.1} %", metrics.cpu_busy_percent).into(),
            ),
            ("CPU pressure", pressure(metrics.cpu_pressure_percent)),
        ],
        MetricGroup::Memory => vec![
            ("Memory total", bytes(metrics.memory_total_bytes).into()),
            (
                "Memory available",
                bytes(metrics.memory_available_bytes).into(),
            ),
            ("Memory pressure", pressure(metrics.memory_pressure_percent)),
        ],
        MetricGroup::Io => vec![
            ("I/O read", bytes(metrics.io_read_bytes).into()),
            ("I/O written", bytes(metrics.io_write_bytes).into()),
            ("I/O pressure", pressure(metrics.io_pressure_percent)),
        ],
    }
}

/// Returns the report with only the metrics of these groups.
fn only_groups(mut report: Value, groups: &[MetricGroup]) -> Value {
    if let Some(metrics) = report.get_mut("metrics").and_then(Value::as_object_mut) {
        metrics.retain(|key, _| groups.iter().any(|group| key.starts_with(group.prefix())));
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_belongs_to_one_group() {
        let report = serde_json::json!({
            "metrics": serde_json::to_value(Metrics::default()).unwrap(),
        });
        let all = [MetricGroup::Cpu, MetricGroup::Memory, MetricGroup::Io];
        assert_eq!(only_groups(report.clone(), &all), report);
        let io = only_groups(report, &[MetricGroup::Io]);
        let keys: Vec<_> = io["metrics"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(
            keys,
            ["io_pressure_percent", "io_read_bytes", "io_write_bytes"]
        );
    }
}
