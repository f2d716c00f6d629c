//! What is shown of the daemon's answers, to people and to programs.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::json;
use support::{FakeDaemon, Reply, status, summary};

#[test]
fn status_says_which_kernel_runs_and_since_when_it_is_silent() {
    let daemon = FakeDaemon::start(|_| Reply::ok(status("web", "unresponsive")));
    let ended = daemon.ctl("status web");
    assert_eq!(ended.code, 0);
    assert!(
        ended.stdout.contains("\nRunning kernel: 6.9.0\n"),
        "{ended:?}"
    );
    let wanted = "\nStatus: UNRESPONSIVE (last heartbeat: 62s ago)\n";
    assert!(ended.stdout.contains(wanted), "{ended:?}");
    assert!(
        ended.stdout.contains("\nReason: no heartbeat for 62 s\n"),
        "{ended:?}"
    );
    assert!(
        !ended.stdout.contains('\u{1b}'),
        "colour without a terminal: {ended:?}"
    );
}

#[test]
fn list_is_one_line_for_each_instance() {
    let daemon = FakeDaemon::start(|_| {
        Reply::ok(json!([
            summary("a", "running"),
            summary("b", "quarantined")
        ]))
    });
    let plain = daemon.ctl("list").stdout;
    let lines: Vec<&str> = plain.lines().collect();
    assert_eq!(lines.len(), 3, "{plain}");
    assert!(lines[0].starts_with("NAME"), "{plain}");
    assert!(lines[1].starts_with("a     RUNNING"), "{plain}");
    assert!(
        lines[2].contains("QUARANTINED") && lines[2].contains("0-2,5"),
        "{plain}"
    );
    assert!(!plain.contains("PUBLISHED"));
    let verbose = daemon.ctl("list --verbose").stdout;
    assert!(verbose.contains("127.0.0.1:6379->6379"), "{verbose}");
}

#[test]
fn programs_get_the_answer_whole_with_fields_unknown_here() {
    let daemon = FakeDaemon::start(|_| {
        let mut answer = summary("a", "running");
        answer["colour"] = json!("blue");
        Reply::ok(json!([answer]))
    });
    let ended = daemon.ctl("list --output-format json");
    assert_eq!(ended.json()[0]["colour"], json!("blue"));
    assert_eq!(ended.json()[0]["state"], json!("running"));
}

#[test]
fn health_shows_the_groups_asked_for() {
    let daemon = FakeDaemon::start(|_| {
        Reply::ok(json!({
            "name": "web", "state": "running", "health": "healthy", "workload_state": "running",
            "age_ms": 120, "reason": null,
            "metrics": {
                "cpu_count": 4, "cpu_busy_percent": 12.5, "cpu_pressure_percent": null,
                "memory_total_bytes": 1_073_741_824u64, "memory_available_bytes": 1024,
                "memory_pressure_percent": 0.5, "io_read_bytes": 0, "io_write_bytes": 0,
                "io_pressure_percent": null,
            },
        }))
    });
    let all = daemon.ctl("health web").stdout;
    assert!(
        all.contains("CPU busy: 12.5 %") && all.contains("Memory total: 1 GiB"),
        "{all}"
    );
    assert!(
        all.contains("CPU pressure: not reported by its kernel"),
        "{all}"
    );
    let memory = daemon.ctl("health web --metrics=memory").stdout;
    assert!(
        memory.contains("Memory total") && !memory.contains("CPU"),
        "{memory}"
    );
    let json = daemon
        .ctl("health web --metrics=memory --output-format=json")
        .json();
    assert!(json["metrics"]["cpu_count"].is_null());
    assert_eq!(json["metrics"]["memory_pressure_percent"], json!(0.5));
}

#[test]
fn pings_that_get_no_answer_are_counted_and_fail_only_when_none_does() {
    use std::sync::atomic::{AtomicU32, Ordering};
    let count = AtomicU32::new(0);
    let daemon = FakeDaemon::start(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        1 => Reply::ok(json!({ "name": "web", "generation": 3, "rtt_us": 1250 })),
        _ => Reply::refusal(504, "timeout", "web did not answer"),
    });
    let ended = daemon.ctl("ping web --count 3 --interval 0");
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended.stdout.contains("generation 3 answered in 1.25 ms"),
        "{ended:?}"
    );
    assert!(ended.stdout.contains("3 sent, 1 answered"), "{ended:?}");
    let ended = daemon.ctl("ping web");
    assert_eq!(ended.code, 10);
}

#[test]
fn recoveries_are_asked_for_by_instance_and_time() {
    let daemon = FakeDaemon::start(|_| {
        Reply::ok(json!([{
            "id": 4, "instance": "web", "failed_generation": 1, "new_generation": 2,
            "cause": "kernel_dead", "evidence": ["exit status 139"], "fence": "process exited",
            "outcome": "recovered", "reason": null, "started_at": "2026-01-31T08:00:00.000Z",
            "ended_at": null, "fence_ms": 4.2, "total_ms": 61.0,
            "vmcore": { "panic": "Fatal exception, after BUG: a fault", "path": "/var/crash/2.vmcore" },
        }]))
    });
    let ended = daemon.ctl("recovery-log --instance web --since 2026-01-31T00:00:00Z");
    assert_eq!(ended.code, 0, "{ended:?}");
    for piece in [
        "2026-01-31 08:00:00",
        "1 -> 2",
        "kernel dead",
        "61.0 ms",
        "exit status 139; Fatal exception, after BUG: a fault; vmcore: /var/crash/2.vmcore",
    ] {
        assert!(ended.stdout.contains(piece), "{piece}: {ended:?}");
    }
    let line = "GET /v1/recoveries?instance=web&since=2026-01-31T00%3A00%3A00.000Z";
    assert_eq!(daemon.lines(), [line]);
}

#[test]
fn events_are_shown_as_they_come_and_counted() {
    let event = |id: u64| {
        let event = json!({
            "id": id, "at": "2026-01-31T08:00:00.000Z", "kind": "instance_state",
            "instance": "web", "generation": 2, "message": "running", "detail": null,
        });
        format!("id: {id}\ndata: {event}\n\n: still here\n\n")
    };
    let stream = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n{}{}{}",
        event(8),
        event(9),
        event(10)
    );
    let daemon = FakeDaemon::start(move |_| Reply::Raw(stream.clone().into_bytes()));
    let ended = daemon.ctl("events --count 2 --since-id 7 --instance web");
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ended.stdout.lines().count(), 2);
    assert!(ended.stdout.contains("web/2: running"), "{ended:?}");
    let line = "GET /v1/events?instance=web&since_id=7&follow=false";
    assert_eq!(daemon.lines(), [line]);
    // History ends where the daemon ends it; who follows is told that the daemon is gone.
    let ended = daemon.ctl("events");
    assert_eq!((ended.code, ended.stdout.lines().count()), (0, 3));
    let ended = daemon.ctl("events --count 1");
    assert!(ended.stdout.contains(" 10  "), "the newest: {ended:?}");
    assert_eq!(daemon.ctl("events --follow --count 4").code, 3);
}

#[test]
fn nothing_to_show_is_said_in_words_and_is_an_empty_list_for_programs() {
    let daemon = FakeDaemon::start(|_| Reply::ok(json!([])));
    assert_eq!(daemon.ctl("list").stdout, "No instances\n");
    assert_eq!(daemon.ctl("operations list").stdout, "No operations\n");
    assert_eq!(daemon.ctl("recovery-log").stdout, "No recoveries\n");
    assert_eq!(daemon.ctl("list --output-format json").json(), json!([]));
}

/// Of an instance that has failed a daemon that was restarted since does not know when it answered last: not "never".
#[test]
fn what_is_not_known_of_the_last_heartbeat_is_not_called_never() {
    for (state, said) in [("starting", "never"), ("quarantined", "not known")] {
        let daemon = FakeDaemon::start(move |_| {
            let mut instance = status("web", state);
            instance["last_heartbeat_ms"] = serde_json::Value::Null;
            Reply::ok(instance)
        });
        let ended = daemon.ctl("status web");
        let wanted = format!("(last heartbeat: {said})");
        assert!(ended.stdout.contains(&wanted), "{ended:?}");
    }
}
