//! An invalid configuration file: the start, `--check` and a reload refuse the same files, and change nothing.

use kmorph_control_api::{ErrorCode, Policy};
use kmorph_tests::Host;
use serde_json::json;

use super::{SOUND, has, undisturbed};

#[test]
fn a_wrong_configuration_is_refused_at_the_start_with_line_and_column() {
    let host = Host::prepare("[defaults]\nheartbeat_timeout_s = 1.0\nheartbeet = 2\n");
    has(
        &host.refused_start(&[]),
        &["kmorphd.conf", "line 3, column 1", "heartbeet"],
    );
    host.configure("[limits]\nrecoveries = \"many\"\n");
    has(
        &host.refused_start(&[]),
        &["line 2, column 14", "recoveries"],
    );
    host.configure("[limits\n");
    has(&host.refused_start(&[]), &["line 1, column"]);
    assert!(!host.path("state").exists(), "nothing was made");
}

#[test]
fn a_wrong_configuration_is_refused_whole_at_a_reload() {
    let host = Host::with(SOUND);
    host.spawn_bare("web");
    let agent = host.agent("web");
    // The first key is valid and would be applied, the second is invalid.
    host.configure("[defaults]\nmorph_timeout_s = 7.0\n[limits]\nrecoverys = 1\n");
    let refused = host.control().request("POST", "/v1/daemon/reload", None);
    let error = refused.refusal();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    has(&error.message, &["line 4, column 1", "recoverys"]);
    has(&error.next_step.unwrap(), &["nothing was changed"]);
    host.spawn_bare("db");
    let policy: Policy = host.control().instance("db").policy;
    assert_ne!(policy.morph_timeout_s, 7.0, "part of the file was applied");
    undisturbed(&host, "web", agent);
}

#[test]
fn a_reload_names_what_changed_and_nothing_else() {
    let host = Host::with(SOUND);
    let reload = |config: &str| {
        host.configure(config);
        let report: serde_json::Value = host
            .control()
            .request("POST", "/v1/daemon/reload", None)
            .ok();
        (report["applied"].clone(), report["needs_restart"].clone())
    };
    assert_eq!(reload(SOUND), (json!([]), json!([])));
    let one = format!("{SOUND}auto_heal = false\n");
    assert_eq!(reload(&one), (json!(["defaults.auto_heal"]), json!([])));
    assert_eq!(
        reload(&one),
        (json!([]), json!([])),
        "it is in force already"
    );
    let waits = format!("{one}[log]\nlevel = \"debug\"\n");
    assert_eq!(reload(&waits), (json!([]), json!(["log.level"])));
    assert_eq!(
        reload(&waits),
        (json!([]), json!(["log.level"])),
        "it still waits"
    );
    assert_eq!(reload(SOUND), (json!(["defaults.auto_heal"]), json!([])));
}

/// The check refuses whatever the start refuses, and creates nothing.
#[test]
fn places_that_the_start_refuses_are_refused_by_the_check() {
    let host = Host::prepare(SOUND);
    let check = || host.refused_start(&["--check".as_ref()]);
    let sound = host.command().arg("--check").status().unwrap();
    assert!(sound.success());
    let open = host.path("open");
    std::fs::create_dir(&open).unwrap();
    let everybodys = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&open, everybodys).unwrap();
    let text = std::fs::read_to_string(host.config_path()).unwrap();
    let [state, run] = ["state", "run"].map(|name| host.path(name).display().to_string());
    let below = format!("{}/state", open.display());
    std::fs::write(host.config_path(), text.replace(&state, &below)).unwrap();
    has(&check(), &["other users can write to"]);
    has(&host.refused_start(&[]), &["other users can write to"]);
    let long = format!("{run}/{}", "x".repeat(100));
    let socket = format!("{run}/kmorphd.sock");
    let longer = text.replace(
        &format!("run_dir = \"{run}\""),
        &format!("run_dir = \"{long}\""),
    );
    std::fs::write(host.config_path(), longer).unwrap();
    has(&check(), &["too long", "--run-dir"]);
    has(&host.refused_start(&[]), &["too long", "--run-dir"]);
    let longer = text.replace(&socket, &format!("{long}/kmorphd.sock"));
    std::fs::write(host.config_path(), longer).unwrap();
    has(&check(), &["too long", "--socket"]);
    assert!(!host.path("state").exists(), "nothing was made");
}

#[test]
fn relative_paths_are_refused_by_check_start_and_reload_alike() {
    let host = Host::with(SOUND);
    let running = std::fs::read_to_string(host.config_path()).unwrap();
    let relative = format!("{running}kv = \"bin/kmorph-kv\"\n");
    std::fs::write(host.config_path(), relative).unwrap();
    let words = [
        "paths.kv: bin/kmorph-kv is not an absolute path",
        "line ",
        "column 6",
    ];
    let reload = host.control().request("POST", "/v1/daemon/reload", None);
    has(&reload.refusal().message, &words);
    has(&host.refused_start(&["--check".as_ref()]), &words);
    has(&host.refused_start(&[]), &words);
}
