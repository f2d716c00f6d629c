//! The machine-readable log: each line about an instance names the instance and its generation; each line about a morph
//! names the session.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use kmorph_control_api::OperationState;
use kmorph_tests::Host;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use serde_json::{Value, json};

/// Beginnings of lines about the daemon itself.
const DAEMONS_OWN: [&str; 6] = [
    "ready",
    "restored",
    "stopping",
    "not locked",
    "reloaded",
    "the transport actor panicked",
];
/// Words of lines that only morphs write.
const MORPHS: [&str; 3] = ["morph: from", "committed", "rolled back"];

fn config(format: &str) -> String {
    format!(
        "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n\
         [log]\nformat = \"{format}\"\nlevel = \"debug\"\n"
    )
}

/// Exercises every part of the daemon that logs: a spawn, a failure, two morphs, a restart during another morph, and a
/// termination.
fn eventful_life(host: &mut Host) {
    host.spawn_kv("web");
    kill(Pid::from_raw(host.agent("web")), Signal::SIGKILL).unwrap();
    host.successor_of("web", 1);
    let kernel = host.kernel("6.12.0-b");
    let morphed = host.control().morph("web", &kernel);
    assert_eq!(morphed.state, OperationState::Succeeded, "{morphed:?}");
    let prepare = json!({ "kernel": kernel, "auto_validate": false });
    let path = "/v1/instances/web/morph";
    host.control().succeed("POST", path, Some(&prepare));
    host.control()
        .succeed("POST", "/v1/instances/web/morph/rollback", None);
    host.control().succeed("POST", path, Some(&prepare));
    host.restart_by_kill();
    host.running("web");
    host.control().succeed("DELETE", "/v1/instances/web", None);
}

/// Checks lines given as key-value pairs, with the message under `msg`.
fn check(lines: &[BTreeMap<String, String>], keys: [&str; 3]) {
    let [instance, generation, session] = keys;
    let mut of_morphs = [0; MORPHS.len()];
    let mut of_instances = 0;
    for line in lines {
        let message = &line["msg"];
        if DAEMONS_OWN.iter().any(|own| message.starts_with(own)) {
            continue;
        }
        of_instances += 1;
        assert_eq!(
            line.get(instance).map(String::as_str),
            Some("web"),
            "{line:?}"
        );
        let number = line.get(generation).map(|g| g.parse::<u64>());
        assert!(matches!(number, Some(Ok(1..))), "{line:?}");
        for (count, words) in of_morphs.iter_mut().zip(MORPHS) {
            if message.contains(words) {
                *count += 1;
                let number = line.get(session).map(|s| s.parse::<u64>());
                assert!(matches!(number, Some(Ok(1..))), "{line:?}");
            }
        }
    }
    assert!(of_instances > 20, "{lines:?}");
    assert!(of_morphs.iter().all(|count| *count > 0), "{of_morphs:?}");
    // Both sides of the committed morph: the new generation starts in it, and the old one ends.
    let in_session = |words: &str| {
        let of =
            |l: &&BTreeMap<String, String>| l["msg"].as_str() == words && l.contains_key(session);
        lines.iter().filter(of).count()
    };
    assert_eq!((in_session("spawned"), in_session("fenced")), (3, 3));
}

#[test]
fn a_line_of_json_says_which_instance_generation_and_session_it_concerns() {
    let mut host = Host::with(&config("json"));
    eventful_life(&mut host);
    let parse = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let pairs = line.as_object().unwrap().iter();
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        pairs.map(|(k, v)| (k.clone(), text(v))).collect()
    };
    let log = host.log();
    let lines: Vec<_> = log.lines().map(parse).collect();
    check(&lines, ["instance", "generation", "session"]);
}

/// Parses a datagram of journald's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).
fn entry(datagram: &[u8]) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let end = rest.iter().position(|b| *b == b'\n').unwrap();
        let line = String::from_utf8_lossy(&rest[..end]).into_owned();
        rest = &rest[end + 1..];
        match line.split_once('=') {
            Some((key, value)) => drop(pairs.insert(key.to_owned(), value.to_owned())),
            None => {
                // The value may contain newlines, so its length comes first.
                let (length, after) = rest.split_at(8);
                let length = usize::try_from(u64::from_le_bytes(length.try_into().unwrap()));
                let (value, after) = after.split_at(length.unwrap());
                pairs.insert(line, String::from_utf8_lossy(value).into_owned());
                rest = &after[1..];
            }
        }
    }
    let message = pairs.remove("MESSAGE").unwrap_or_default();
    pairs.insert("msg".to_owned(), message);
    pairs
}

#[test]
fn an_entry_of_the_journal_says_which_instance_generation_and_session_it_concerns() {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED: only root can put a socket in the place of journald's");
        return;
    }
    // A /run that only this thread and its children see.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(none, Path::new("/"), none, private, none).unwrap();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    std::fs::create_dir_all("/run/systemd/journal").unwrap();
    let journald = UnixDatagram::bind("/run/systemd/journal/socket").unwrap();
    let reader = std::thread::spawn(move || {
        let mut entries = Vec::new();
        let mut datagram = vec![0; 64 * 1024];
        loop {
            let length = journald.recv(&mut datagram).unwrap();
            if &datagram[..length] == b"end" {
                return entries;
            }
            entries.push(entry(&datagram[..length]));
        }
    });
    let mut host = Host::with(&config("journald"));
    eventful_life(&mut host);
    let end = UnixDatagram::unbound().unwrap();
    end.send_to(b"end", "/run/systemd/journal/socket").unwrap();
    let entries = reader.join().unwrap();
    check(&entries, ["INSTANCE", "GENERATION", "SESSION"]);
    let log = host.log();
    assert!(
        !log.contains("generation"),
        "it is all in the journal: {log}"
    );
}
