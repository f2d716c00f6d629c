//! Each way in which asking the daemon can fail, and how kmorphctl ends then.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::os::unix::net::UnixListener;

use serde_json::json;
use support::{FakeDaemon, Reply, ctl};

#[test]
fn without_a_daemon_it_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kmorphd.sock");
    let ended = ctl(&socket, &["list"]);
    assert_eq!(ended.code, 3);
    assert!(ended.stderr.contains(socket.to_str().unwrap()), "{ended:?}");
    assert!(ended.stderr.contains("kmorphctl daemon start"), "{ended:?}");
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_socket_that_an_earlier_daemon_left_is_told_from_a_missing_one() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kmorphd.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let ended = ctl(&socket, &["list"]);
    assert_eq!(ended.code, 3);
    assert!(
        ended.stderr.contains("left behind by an earlier daemon"),
        "{ended:?}"
    );
}

#[test]
fn a_file_that_is_no_socket_is_called_that() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("passwd");
    std::fs::write(&file, "").unwrap();
    let ended = ctl(&file, &["list"]);
    assert_eq!(ended.code, 3);
    assert!(ended.stderr.contains("not a socket"), "{ended:?}");
    assert!(ended.stderr.contains("--socket"), "{ended:?}");
}

#[test]
fn each_refusal_has_its_exit_code_and_keeps_reason_and_hint() {
    for (status, code, exit) in [
        (400, "invalid_request", 7),
        (403, "forbidden", 6),
        (404, "not_found", 4),
        (413, "too_large", 7),
        (422, "bad_kernel_image", 7),
        (409, "already_exists", 5),
        (409, "wrong_state", 5),
        (409, "incompatible", 5),
        (409, "over_budget", 5),
        (409, "insufficient_resources", 9),
        (503, "busy", 9),
        (504, "timeout", 10),
        (503, "unavailable", 9),
        (507, "journal_unavailable", 12),
        (409, "operator_action_needed", 12),
        (501, "not_implemented", 11),
        (500, "internal", 1),
    ] {
        let daemon = FakeDaemon::start(move |_| Reply::refusal(status, code, "it is so"));
        let ended = daemon.ctl("status web");
        assert_eq!(ended.code, exit, "{code}");
        assert_eq!(ended.stderr, "error: it is so\n  hint: do something else\n");
        assert_eq!(ended.stdout, "");

        let ended = daemon.ctl("--output-format json status web");
        assert_eq!(ended.code, exit, "{code}");
        let said: serde_json::Value = serde_json::from_str(&ended.stderr).unwrap();
        let wanted = json!({ "exit_code": exit, "code": code, "message": "it is so",
                             "next_step": "do something else" });
        assert_eq!(said["error"], wanted);
    }
}

#[test]
fn a_refusal_that_only_a_newer_daemon_knows_keeps_its_reason() {
    let daemon = FakeDaemon::start(|_| Reply::refusal(409, "wrong_moon_phase", "wait a week"));
    let ended = daemon.ctl("status web");
    assert_eq!(ended.code, 1);
    assert!(
        ended.stderr.starts_with("error: wait a week\n"),
        "{ended:?}"
    );
}

#[test]
fn a_silent_daemon_is_given_up_after_the_timeout() {
    let daemon = FakeDaemon::start(|_| Reply::Silence);
    let ended = daemon.ctl("--timeout 0.2 status web");
    assert_eq!(ended.code, 10);
    assert!(ended.stderr.contains("within 0.2s"), "{ended:?}");
}

#[test]
fn an_answer_cut_off_in_the_middle_is_no_answer() {
    let half = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"name\":".to_vec();
    let daemon = FakeDaemon::start(move |_| Reply::Raw(half.clone()));
    let ended = daemon.ctl("status web");
    assert_eq!(ended.code, 3);
    assert!(ended.stderr.contains("closed the connection"), "{ended:?}");
}

#[test]
fn something_else_on_the_socket_is_noticed() {
    for (bytes, exit, said) in [
        (&b"SSH-2.0-OpenSSH\r\n"[..], 3, "closed the connection"),
        (b"", 3, "closed the connection"),
        (
            b"HTTP/1.1 502 Bad\r\nContent-Length: 6\r\n\r\n<html>",
            1,
            "refused with HTTP 502 and gave no reason: \"<html>\"",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            1,
            "cannot be parsed",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            1,
            "cannot be parsed: missing field",
        ),
    ] {
        let daemon = FakeDaemon::start(move |_| Reply::Raw(bytes.to_vec()));
        let ended = daemon.ctl("status web");
        assert_eq!(ended.code, exit, "{ended:?}");
        assert!(ended.stderr.contains(said), "{ended:?}");
    }
}

#[test]
fn an_endless_answer_is_not_read_to_its_end() {
    let mut endless = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n[".to_vec();
    endless.resize(65 << 20, b' ');
    let daemon = FakeDaemon::start(move |_| Reply::Raw(endless.clone()));
    let ended = daemon.ctl("list");
    assert_eq!(ended.code, 1);
    assert!(
        ended.stderr.contains("sent an answer of more than"),
        "{ended:?}"
    );
}

#[test]
fn what_an_instance_says_does_not_steer_the_terminal() {
    let daemon = FakeDaemon::start(|_| {
        let mut status = support::status("web", "running");
        status["kernel_release"] = json!("6.9.0\u{1b}[2J");
        Reply::ok(status)
    });
    let ended = daemon.ctl("status web");
    assert_eq!(ended.code, 0);
    assert!(
        ended.stdout.contains("Running kernel: 6.9.0\\u{1b}[2J\n"),
        "{ended:?}"
    );
}

#[test]
fn what_is_not_built_yet_says_so_without_asking_anybody() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kmorphd.sock");
    for words in [&["monitor"][..], &["debug", "console"]] {
        let ended = ctl(&socket, words);
        assert_eq!(ended.code, 11, "{words:?}");
        assert!(ended.stderr.contains("is not built yet"), "{ended:?}");
    }
}

#[test]
fn a_command_line_that_makes_no_sense_ends_with_2() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kmorphd.sock");
    assert_eq!(ctl(&socket, &["spawn"]).code, 2);
    assert_eq!(ctl(&socket, &[]).code, 2);
    // Clap lets this one through, because options may stand before a step's name.
    let both = ["morph", "web", "--kernel=/k", "status", "web"];
    assert_eq!(ctl(&socket, &both).code, 2);
    assert_eq!(ctl(&socket, &["--help"]).code, 0);
}
