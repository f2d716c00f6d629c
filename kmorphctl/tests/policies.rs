//! Policies: files taken whole or not at all, single values.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::{Value, json};
use support::{FakeDaemon, Reply};

fn policy() -> Value {
    json!({ "heartbeat_timeout_s": 1.0, "auto_heal": true, "morph_timeout_s": 60.0 })
}

fn daemon() -> FakeDaemon {
    FakeDaemon::start(|request| match request.line.as_str() {
        "PUT /v1/policies" => Reply::ok(request.body.clone()),
        "GET /v1/policies" => Reply::ok(json!({ "instance": { "a": policy(), "b": policy() } })),
        _ => Reply::ok(policy()),
    })
}

const GOOD: &str = "[instance.a]\nheartbeat_timeout_s = 5\nauto_heal = false\n\
                    morph_timeout_s = 30\n\n[instance.b]\nheartbeat_timeout_s = 0.5\n\
                    auto_heal = true\nmorph_timeout_s = 60\n";

fn import(daemon: &FakeDaemon, text: &[u8]) -> support::Ended {
    let file = daemon.dir.path().join("policies.toml");
    std::fs::write(&file, text).unwrap();
    daemon.ctl(&format!("policy import {}", file.display()))
}

#[test]
fn a_sound_file_is_applied() {
    let daemon = daemon();
    let ended = import(&daemon, GOOD.as_bytes());
    assert_eq!(ended.code, 0, "{ended:?}");
    let sent = daemon.body("PUT /v1/policies");
    assert_eq!(sent["instance"]["a"]["heartbeat_timeout_s"], json!(5.0));
    assert_eq!(sent["instance"]["b"]["auto_heal"], json!(true));
}

#[test]
fn one_bad_line_refuses_the_whole_file_with_its_line_and_column() {
    for (from, to, place) in [
        ("= 0.5", "= 0.01", "policies.toml:7:23: "),
        ("= 0.5", "= soon", "policies.toml:7:23: "),
        ("auto_heal = false", "auto_heal = 0", "policies.toml:3:13: "),
        (
            "auto_heal = false",
            "auto_kill = false",
            "policies.toml:3:1: ",
        ),
        ("[instance.b]", "[instance.b", "policies.toml:6:12: "),
    ] {
        let daemon = daemon();
        let ended = import(&daemon, GOOD.replace(from, to).as_bytes());
        assert_eq!(ended.code, 7, "{ended:?}");
        assert!(ended.stderr.contains(place), "{to}: {ended:?}");
        assert!(ended.stderr.contains("nothing was changed"), "{ended:?}");
        assert!(
            daemon.lines().is_empty(),
            "something was asked of the daemon"
        );
    }
}

#[test]
fn an_unknown_instance_refuses_the_whole_file() {
    let daemon = daemon();
    let ended = import(&daemon, GOOD.replace("instance.b", "instance.c").as_bytes());
    assert_eq!(ended.code, 4, "{ended:?}");
    assert!(ended.stderr.contains("policies.toml:6:"), "{ended:?}");
    assert_eq!(daemon.lines(), ["GET /v1/policies"]);
}

#[test]
fn what_is_no_policy_file_is_refused() {
    let daemon = daemon();
    let too_large = vec![b'#'; (1 << 20) + 1];
    assert_eq!(import(&daemon, &too_large).code, 7);
    assert_eq!(import(&daemon, b"\xff\xfe").code, 7);
    assert_eq!(daemon.ctl("policy import /nonexistent/file").code, 7);
    assert!(daemon.lines().is_empty());
}

#[test]
fn an_export_replaces_its_file_and_can_be_imported() {
    let daemon = daemon();
    let file = daemon.dir.path().join("out.toml");
    std::fs::write(
        &file,
        "something older and longer than what comes\n".repeat(100),
    )
    .unwrap();
    let ended = daemon.ctl(&format!("policy export --output={}", file.display()));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        daemon.ctl("policy export").stdout
    );
    assert_eq!(
        daemon
            .ctl(&format!("policy import {}", file.display()))
            .code,
        0
    );
    let left = std::fs::read_dir(daemon.dir.path()).unwrap().count();
    assert_eq!(left, 2, "the socket and the file, nothing else");
}

#[test]
fn an_export_follows_no_symbolic_link_and_keeps_the_mode_of_its_file() {
    use std::os::unix::fs::PermissionsExt;
    let daemon = daemon();
    let (target, link) = (
        daemon.dir.path().join("mine"),
        daemon.dir.path().join("out.toml"),
    );
    std::fs::write(&target, "precious").unwrap();
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    let ended = daemon.ctl(&format!("policy export --output={}", link.display()));
    assert_eq!(ended.code, 7, "{ended:?}");
    assert!(ended.stderr.contains("symbolic link"), "{ended:?}");
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
    let ended = daemon.ctl(&format!("policy export --output={}", target.display()));
    assert_eq!(ended.code, 0, "{ended:?}");
    let mode = std::fs::metadata(&target).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn an_export_that_cannot_be_written_leaves_nothing() {
    let daemon = daemon();
    let ended = daemon.ctl("policy export --output=/nonexistent/p.toml");
    assert_eq!(ended.code, 7);
    assert!(ended.stderr.contains("/nonexistent/p.toml"), "{ended:?}");
}

#[test]
fn one_value_is_changed_and_the_others_are_not_sent() {
    for (words, sent) in [
        (
            "heartbeat-timeout a 2.5",
            json!({ "heartbeat_timeout_s": 2.5 }),
        ),
        ("auto-heal a disabled", json!({ "auto_heal": false })),
        ("auto-heal a enabled", json!({ "auto_heal": true })),
        ("morph-timeout a 90", json!({ "morph_timeout_s": 90.0 })),
    ] {
        let daemon = daemon();
        let ended = daemon.ctl(&format!("policy set {words}"));
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(daemon.body("PATCH /v1/instances/a/policy"), sent);
    }
}
