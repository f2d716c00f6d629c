//! Instances for measurements, and the events that report their state.

use std::path::PathBuf;
use std::time::Instant;

use kmorph_control_api::{Event, EventKind};
use kmorph_tests::resp::Client;
use kmorph_tests::{Arrived, Events, Host};
use serde_json::{Value, json};

/// Size of the kernel images for the embedded backend, bytes: that of a real image, because the whole image is read and
/// hashed.
const IMAGE_BYTES: usize = 8 << 20;
/// Size of the values in a key-value server, bytes.
pub(crate) const VALUE_BYTES: usize = 4096;

/// Creates a kernel image of this release with the size of a real image.
pub(crate) fn image(host: &Host, release: &str) -> PathBuf {
    let path = host.path(&format!("vmlinuz-{release}"));
    let mut bytes = kmorph_backends::kernel_image::synthetic(release);
    bytes.resize(IMAGE_BYTES, 0);
    std::fs::write(&path, bytes).expect("an image can be written");
    path
}

/// Returns a request for an instance without a program.
pub(crate) fn bare(name: &str, kernel: &std::path::Path) -> Value {
    json!({ "name": name, "kernel": kernel })
}

/// Returns a request for an instance that runs the key-value server, published on a port that the system chooses.
pub(crate) fn key_value(name: &str, kernel: &std::path::Path, args: &[&str]) -> Value {
    json!({
        "name": name,
        "kernel": kernel,
        "workload": { "program": "kmorph-kv", "args": args },
        "publish": [{ "address": "127.0.0.1", "host_port": 0, "port": 6379 }],
    })
}

/// Spawns an instance; returns the time of the request, and the event that the instance runs.
pub(crate) fn spawn(host: &Host, events: &Events, request: &Value) -> (Instant, Arrived) {
    let name = request["name"].as_str().expect("a name").to_owned();
    let asked = Instant::now();
    let reply = host
        .control()
        .request("POST", "/v1/instances", Some(request));
    assert!(reply.status < 300, "not spawned: {}", reply.body);
    let running = events.wait("a spawned instance to run", |e| runs(e, &name, 1));
    (asked, running)
}

/// Fills the key-value server at `port` with `bytes` of values.
pub(crate) fn fill(port: u16, bytes: usize) {
    let mut client = Client::connect(port).expect("the server accepts");
    let filled = client.fill(bytes / VALUE_BYTES, VALUE_BYTES);
    filled.expect("the server takes the values");
}

/// Returns the host port of the first published port of `name`.
pub(crate) fn port(host: &Host, name: &str) -> u16 {
    let listen = &host.control().instance(name).summary.published[0].listen;
    let port = listen.rsplit_once(':').and_then(|(_, p)| p.parse().ok());
    port.expect("an address has a port")
}

/// Terminates `name`.
pub(crate) fn terminate(host: &Host, name: &str) {
    let path = format!("/v1/instances/{name}?force=true");
    host.control().succeed("DELETE", &path, None);
}

/// Returns true if `event` reports that `name` runs, in this generation or a later one.
pub(crate) fn runs(event: &Event, name: &str, generation: u64) -> bool {
    event.kind == EventKind::InstanceState
        && event.instance.as_deref() == Some(name)
        && event.generation >= Some(generation)
        && event.detail["state"] == "running"
}

/// Returns true if `event` is the detector's verdict on `name`.
pub(crate) fn verdict(event: &Event, name: &str) -> bool {
    event.kind == EventKind::Detector
        && event.instance.as_deref() == Some(name)
        && ["kernel_dead", "agent_dead"]
            .iter()
            .any(|v| event.message.starts_with(v))
}
