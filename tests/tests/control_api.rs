//! The description of the control API matches the served API, in both directions.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use kmorph_tests::{DEADLINE, Host};
use serde_json::Value;

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// Returns the daemon's answer to `method path` with a body that is invalid JSON: every change is refused, or the named
/// resource does not exist. For a stream, returns the head.
fn ask(host: &Host, method: &str, path: &str) -> String {
    let mut stream = UnixStream::connect(host.path("run/kmorphd.sock")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let head = format!(
        "{} {path} HTTP/1.0\r\nHost: k\r\nContent-Length: 1\r\n\r\n[",
        method.to_uppercase()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let read = stream.read(&mut piece).unwrap();
        answer.extend_from_slice(&piece[..read]);
        let text = String::from_utf8_lossy(&answer).into_owned();
        let streams = text.contains("text/event-stream") && text.contains("\r\n\r\n");
        if read == 0 || streams {
            return text;
        }
    }
}

fn served(host: &Host, method: &str, path: &str) -> bool {
    let answer = ask(host, method, path);
    let none = format!("there is no {} /", method.to_uppercase());
    assert!(answer.starts_with("HTTP/1.0 "), "{method} {path}: {answer}");
    !answer.contains(&none) && !answer.starts_with("HTTP/1.0 405 ")
}

/// Returns the paths and methods of the document, with their descriptions.
fn described(host: &Host) -> BTreeMap<(String, String), Value> {
    let document: Value = host.control().get("/v1/openapi.json");
    let paths = document["paths"].as_object().unwrap();
    let mut all = BTreeMap::new();
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            all.insert((path.clone(), method.clone()), operation.clone());
        }
    }
    all
}

fn example(path: &str) -> String {
    path.replace("{name}", "none").replace("{id}", "op-999999")
}

fn parameters<'a>(operation: &'a Value, place: &str) -> Vec<&'a str> {
    let all = operation["parameters"].as_array();
    let of_place = all.into_iter().flatten().filter(|p| p["in"] == place);
    of_place.map(|p| p["name"].as_str().unwrap()).collect()
}

#[test]
fn what_is_described_is_served_and_nothing_else() {
    let host = Host::new();
    let all = described(&host);
    let mut paths: Vec<&String> = all.keys().map(|(path, _)| path).collect();
    paths.dedup();
    assert!(paths.len() > 15, "{paths:?}");
    for path in paths {
        for method in METHODS {
            let wanted = all.contains_key(&(path.clone(), method.to_owned()));
            let found = served(&host, method, &example(path));
            assert_eq!(found, wanted, "{method} {path}");
        }
    }
}

#[test]
fn query_parameters_are_described_as_they_are_taken() {
    let host = Host::new();
    let all = described(&host);
    let mut found = Vec::new();
    for ((path, method), operation) in &all {
        let names = parameters(operation, "query");
        let in_path: Vec<_> = path.split('/').filter(|p| p.starts_with('{')).collect();
        assert_eq!(parameters(operation, "path").len(), in_path.len(), "{path}");
        for name in &names {
            // The value may be invalid, because an unknown parameter is refused by its name.
            let path = format!("{}?{name}=1", example(path));
            let answer = ask(&host, method, &path);
            assert!(!answer.contains("unknown field"), "{path}: {answer}");
            found.push(format!("{method} {name}"));
        }
        if !names.is_empty() {
            let answer = ask(&host, method, &format!("{}?sinse=1", example(path)));
            assert!(answer.contains("unknown field `sinse`"), "{answer}");
            // The refusal lists the known parameters.
            for name in &names {
                assert!(answer.contains(&format!("`{name}`")), "{name}: {answer}");
            }
            let listed = answer.matches('`').count() / 2 - 1;
            assert_eq!(listed, names.len(), "{path}: {answer}");
        }
    }
    found.sort_unstable();
    let known = [
        "delete force",
        "get follow",
        "get instance",
        "get instance",
        "get seen",
        "get since",
        "get since_id",
        "get wait_ms",
    ];
    assert_eq!(found, known);
    let events = &all[&("/v1/events".to_owned(), "get".to_owned())];
    assert_eq!(parameters(events, "header"), ["Last-Event-ID"]);
}
