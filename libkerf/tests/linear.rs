//! Reading and writing four times as much input takes about four times as long, for every kind of input: nothing is
//! quadratic.
//!
//! Times are CPU times of this thread, so that other work on the machine does not count. Quadratic code takes sixteen
//! times as long; the bound is in between.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use libkerf::tree::{DeviceTree, Node};
use libkerf::{check, dtb, dts, kerf_text};
use nix::time::{ClockId, clock_gettime};

/// Maximum factor of time for four times as much input.
const MOST: u32 = 10;
/// Minimum time of one run that gives a meaningful measurement.
const LEAST: Duration = Duration::from_millis(2);
/// Number of runs of each measurement; the fastest counts.
const RUNS: usize = 3;

fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

fn fastest(work: &dyn Fn()) -> Duration {
    let run = |_| {
        let start = cpu_time();
        work();
        cpu_time() - start
    };
    (0..RUNS).map(run).min().unwrap()
}

/// Compares the time of `work` for `count` with the time for four times as many.
fn is_linear(what: &str, count: usize, work: impl Fn(usize) -> Box<dyn Fn()>) {
    let (few, many) = (fastest(&work(count)), fastest(&work(4 * count)));
    println!("{what}: {few:?} for {count}, {many:?} for {}", 4 * count);
    let bound = few.max(LEAST) * MOST;
    assert!(
        many < bound,
        "{what}: {few:?}, and {many:?} for four times as much"
    );
}

/// Measures reading a source, valid or not.
fn source(what: &str, count: usize, text: impl Fn(usize) -> String) {
    is_linear(what, count, |count| {
        let text = format!("/dts-v1/;\n{}\n", text(count));
        Box::new(move || {
            let _ = std::hint::black_box(dts::read(&text));
        })
    });
}

fn each(count: usize, text: impl Fn(usize) -> String) -> String {
    (0..count).map(text).collect()
}

#[test]
fn values_are_read_in_linear_time() {
    source("bytes without space", 25_000, |n| {
        format!("/ {{ a = [{}]; }};", "ab".repeat(n))
    });
    source("bytes of digits", 25_000, |n| {
        format!("/ {{ a = [{}]; }};", "01".repeat(n))
    });
    source("letters before a colon", 25_000, |n| {
        format!("/ {{ a = [{}:]; }};", "01".repeat(n))
    });
    source("cells", 10_000, |n| {
        format!("/ {{ a = <{}>; }};", "1 ".repeat(n))
    });
    source("labels in a value", 10_000, |n| {
        format!("/ {{ a = <{}>; }};", each(n, |i| format!("l{i}: 1 ")))
    });
    source("a label often", 10_000, |n| {
        format!("/ {{ {}n {{ }}; }};", "l: ".repeat(n))
    });
    source("references", 5_000, |n| {
        format!(
            "/ {{ a = <{}>; n {{ l: n {{ }}; }}; }};",
            "&l &{/n/n} ".repeat(n)
        )
    });
    source("references to as many", 3_000, |n| {
        let nodes = each(n, |i| format!("l{i}: n{i} {{ }};"));
        format!("/ {{ a = <{}>; {nodes} }};", each(n, |i| format!("&l{i} ")))
    });
    source("comments", 25_000, |n| {
        format!("/ {{ {} }};", "/* */ // \n".repeat(n))
    });
    source("markers of lines", 10_000, |n| {
        format!("/ {{\n{}}};", "# 1 \"x\" 1\n".repeat(n))
    });
    source("expressions", 3_000, |n| {
        format!("/ {{ a = <({}1)>; }};", "1 + ".repeat(n))
    });
}

#[test]
fn names_are_read_in_linear_time() {
    source("properties", 10_000, |n| {
        format!("/ {{ {} }};", each(n, |i| format!("p{i};")))
    });
    source("nodes", 5_000, |n| {
        format!("/ {{ {} }};", each(n, |i| format!("n{i} {{ }};")))
    });
    source("a property of a large node, over and over", 5_000, |n| {
        let properties = each(n, |i| format!("p{i};"));
        format!(
            "/ {{ l: n {{ {properties} }}; }}; {}",
            "&l { p0; };".repeat(n)
        )
    });
    source("labels that are opened", 5_000, |n| {
        let nodes = each(n, |i| format!("l{i}: n{i} {{ }};"));
        format!(
            "/ {{ {nodes} }}; {}",
            each(n, |i| format!("&l{i} {{ a; }};"))
        )
    });
    source("nodes that are deleted", 5_000, |n| {
        let nodes = each(n, |i| format!("l{i}: n{i} {{ }};"));
        format!(
            "/ {{ {nodes} }}; {}",
            each(n, |i| format!("/delete-node/ &l{i};"))
        )
    });
    source("one label, given and lost", 5_000, |n| {
        let nodes = each(n, |i| format!("l: n{i} {{ }};"));
        let gone = each(n, |i| format!("/delete-node/ n{i};"));
        format!(
            "/ {{ {nodes} }}; / {{ {gone} }}; / {{ l: m {{ }}; }}; {}",
            "&l { };".repeat(n)
        )
    });
    source("a large node, deleted and brought back", 5_000, |n| {
        let properties = each(n, |i| format!("p{i};"));
        let again = "/delete-node/ n; n { p0; };".repeat(n);
        format!("/ {{ n {{ {properties} }}; }}; / {{ {again} }};")
    });
    source("many nodes below long names", 3_000, |n| {
        let long = "n".repeat(200);
        let open = format!("{long} {{").repeat(40);
        let nodes = each(n, |i| format!("n{i} {{ }};"));
        format!("/ {{ {open} {nodes} {} }};", "};".repeat(40))
    });
}

#[test]
fn blobs_are_read_and_written_in_linear_time() {
    let named = |count: usize| {
        let mut node = Node::new("");
        for number in 0..count / 100 {
            let one = |node: Node, n: usize| node.with_flag(&format!("name-{number}-{n}"));
            node.push((0..100).fold(Node::new(format!("n{number}")), one));
        }
        DeviceTree::new(node)
    };
    is_linear("names to a blob", 5_000, |count| {
        let tree = named(count);
        Box::new(move || drop(dtb::write(&tree).unwrap()))
    });
    is_linear("a blob with many names", 5_000, |count| {
        let blob = dtb::write(&named(count)).unwrap();
        Box::new(move || drop(dtb::read(&blob).unwrap()))
    });
    is_linear("a blob as source", 2_500, |count| {
        let tree = dtb::read(&dtb::write(&named(count)).unwrap()).unwrap();
        Box::new(move || drop(dts::write(&tree).unwrap()))
    });
    is_linear("fragments of an overlay", 1_500, |count| {
        let fragment = |n: usize| {
            let overlay = Node::new("__overlay__")
                .with_child(Node::new("instance-remove").with_text("instance-name", "x"));
            Node::new(format!("fragment@{n:x}"))
                .with_text("target-path", "/instances")
                .with_child(overlay)
        };
        let tree = DeviceTree::new(Node::new("").with_children((0..count).map(fragment)));
        Box::new(move || drop(check::overlay(&tree, None)))
    });
    is_linear("operations that nobody knows", 1_500, |count| {
        let unknown = (0..count).map(|n| Node::new(format!("x{n}")));
        let fragment = Node::new("fragment@0")
            .with_text("target-path", "/instances")
            .with_child(Node::new("__overlay__").with_children(unknown));
        let tree = DeviceTree::new(Node::new("").with_child(fragment));
        Box::new(move || drop(check::overlay(&tree, None)))
    });
}

#[test]
fn kerfs_old_text_is_read_in_linear_time() {
    let text = |what: &str, count: usize, middle: &dyn Fn(usize) -> String| {
        is_linear(what, count, |count| {
            let text = middle(count);
            Box::new(move || {
                let _ = std::hint::black_box(kerf_text::read(&text));
            })
        });
    };
    const POOL: &str = "cpus = <1>; memory-base = <0>; memory-bytes = <1000>;";
    text("devices", 2_000, &|n| {
        let devices = each(n, |i| format!("d{i} {{ pci-id = \"0000:09:00.0\"; }};"));
        format!("/multikernel-v1/; / {{ resources {{ {POOL} devices {{ {devices} }}; }}; }};")
    });
    text("deep braces in devices", 100, &|n| {
        let devices = format!("{}{}", "d{".repeat(40), "}".repeat(40)).repeat(n);
        format!("/multikernel-v1/; / {{ resources {{ {POOL} devices {{ {devices} }}; }}; }};")
    });
    text("ids that are none", 3_000, &|n| {
        let ids = "id = <".repeat(n);
        format!("resources {{ {POOL} }} instances {{\ni {{\n{ids}>\n}}\n}}")
    });
    text("instances", 1_000, &|n| {
        let instances = each(n, |i| {
            format!("i{i} {{\nid = <1>;\nresources {{ {POOL} }};\n}}\n")
        });
        format!("/multikernel-v1/; / {{ resources {{ {POOL} }}; instances {{\n{instances} }}; }};")
    });
    text("keys without an end", 5_000, &|n| {
        format!("resources {{ {POOL} }} {}", "cpus = <".repeat(n))
    });
    text("blocks without an end", 5_000, &|n| {
        format!("resources {{ {POOL} {}", "resources {".repeat(n))
    });
    text("references", 2_000, &|n| {
        let references = each(n, |i| {
            format!("e_vf{i}: net-vf@1 {{ parent = <&e>; vf-id = <1>; }};")
        });
        format!("/multikernel-v1/; / {{ resources {{ {POOL} }}; {references} }};")
    });
    text("labels", 5_000, &|n| {
        format!("resources {{ {POOL} }} {}", "e_vf1: a-b@1 {".repeat(n))
    });
}
