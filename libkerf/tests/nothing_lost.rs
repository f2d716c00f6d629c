//! The whole contents of an overlay's tree are written back, or refused by name: nothing is lost silently.

#![allow(clippy::unwrap_used, reason = "tests")]

use libkerf::check::{self, Report, Rule};
use libkerf::overlay::{Overlay, State};
use libkerf::tree::{DeviceTree, Node, Property};
use libkerf::{dtb, dts};

const CHANGE: &str = include_str!("trees/change.dts");
const VIRTIO: &str = include_str!("trees/virtio.dts");

fn read(tree: &DeviceTree) -> (Overlay, Report) {
    check::overlay(tree, None)
}

fn written(overlay: &Overlay) -> DeviceTree {
    dtb::read(&overlay.to_blob().unwrap()).unwrap()
}

#[test]
fn virtio_devices_are_read_and_written() {
    let tree = dts::read(VIRTIO).unwrap();
    let (overlay, report) = read(&tree);
    assert!(report.is_valid(), "{report}");
    let node = "/fragment@0/__overlay__/instance-create/resources/virtio";
    let written = written(&overlay);
    assert_eq!(written.node(node), tree.node(node));
    assert_eq!(check::overlay(&written, None).0, overlay);
}

#[test]
fn an_instances_own_tree_keeps_its_virtio_devices() {
    let text =
        "/dts-v1/; / { compatible = \"multikernel-v1\"; model = \"web\"; id = <1>; resources {
        cpus = <0 8>; virtio { net@0 { device-id = <1>; queues = <2>; mac = [02 00]; }; }; }; };";
    let mut tree = dts::read(text).unwrap();
    let mut web = check::instance(&tree).0.unwrap();
    assert_eq!(web.virtio.len(), 1);
    assert_eq!(check::instance(&web.to_tree()).0.unwrap(), web);
    web.virtio[0].queue_size = Some(64);
    web.write_to(&mut tree);
    assert_eq!(check::instance(&tree).0.unwrap(), web);
    let device = tree.node("/resources/virtio/net@0").unwrap();
    assert!(device.property("mac").is_some(), "what is not known stays");
}

#[test]
fn an_overlay_is_no_way_to_change_virtio_devices() {
    let text = "/dts-v1/; / { resources { cpus = <0 8>; memory@0 { size = <0 0x40000000>; }; };
        instances { web { id = <1>; resources { cpus = <0 8>; memory-bytes = <0 0x1000000>;
        virtio { net@0 { device-id = <1>; queues = <2>; }; }; }; }; }; };";
    let (system, _) = check::system(&dts::read(text).unwrap(), check::Context::default());
    let mut after = system.clone();
    after.instances[0].virtio[0].queues = 4;
    let error = State::new(system).overlay_to(&after).unwrap_err();
    assert!(error.to_string().contains("virtio"), "{error}");
}

/// Collects the paths of all nodes of a tree.
fn places(node: &Node, way: &mut Vec<usize>, found: &mut Vec<Vec<usize>>) {
    found.push(way.clone());
    for (number, child) in node.children().iter().enumerate() {
        way.push(number);
        places(child, way, found);
        way.pop();
    }
}

fn at<'a>(root: &'a mut Node, way: &[usize]) -> &'a mut Node {
    way.iter()
        .fold(root, |node, number| &mut node.children_mut()[*number])
}

fn holds(node: &Node, name: &str) -> bool {
    node.properties().iter().any(|p| p.name() == name)
        || node
            .children()
            .iter()
            .any(|c| c.name() == name || holds(c, name))
}

#[test]
fn what_is_not_known_is_written_or_refused_by_name_wherever_it_stands() {
    for text in [CHANGE, VIRTIO] {
        let tree = dts::read(text).unwrap();
        let mut all = Vec::new();
        places(tree.root(), &mut Vec::new(), &mut all);
        for way in all {
            for unknown in ["x-node", "x-property"] {
                let mut larger = tree.clone();
                let node = at(larger.root_mut(), &way);
                match unknown {
                    "x-node" => node.push(Node::new(unknown).with_u32("y", 1)),
                    _ => node.set(Property::new(unknown, [1])),
                }
                let (overlay, report) = read(&larger);
                let named = report.errors().any(|finding| {
                    finding.path.as_str().ends_with(unknown)
                        || finding.property.as_deref() == Some(unknown)
                        || finding.problem.contains(unknown)
                });
                let kept = holds(written(&overlay).root(), unknown);
                assert!(kept || named, "{unknown} at {way:?} is lost:\n{report}");
            }
        }
    }
}

#[test]
fn a_value_that_cannot_be_kept_is_refused_by_name() {
    let cases = [
        ("cpu@16 {", "cpu@16 { flags = [01];", "flags"),
        ("alias = \"eth2\"", "alias = [01 02]", "alias"),
        (
            "memory@0 { reg",
            "memory@0 { mem-type = [01]; reg",
            "mem-type",
        ),
        ("memory@0 { reg", "memory@0 { size = <0 1>; reg", "size"),
        (
            "compatible = \"linux,multikernel-overlay\"",
            "compatible = \"other\"",
            "compatible",
        ),
        (
            "fragment@0",
            "mk,resources = <1>; fragment@0",
            "mk,resources",
        ),
    ];
    for (old, new, property) in cases {
        assert!(CHANGE.contains(old), "{old}");
        let tree = dts::read(&CHANGE.replacen(old, new, 1)).unwrap();
        let report = read(&tree).1;
        let named = |finding: &check::Finding| finding.property.as_deref() == Some(property);
        assert!(report.errors().any(named), "{property}: {report}");
    }
}

#[test]
fn nodes_without_anything_in_them_are_kept() {
    let old = "memory-bytes = /bits/ 64 <0x10000000>;";
    for (place, path) in [
        ("virtio { };", "/resources/virtio"),
        ("virtio { x; };", "/resources/virtio"),
        ("uring { };", "/resources/uring"),
        ("}; options { ", "/options"),
    ] {
        let tree = dts::read(&CHANGE.replacen(old, &format!("{old} {place}"), 1)).unwrap();
        let path = format!("/fragment@0/__overlay__/instance-create{path}");
        assert!(tree.node(&path).is_some(), "{path}");
        let (overlay, report) = read(&tree);
        assert!(report.is_valid(), "{report}");
        let written = written(&overlay);
        assert_eq!(written.node(&path), tree.node(&path));
        assert_eq!(read(&written).0, overlay);
    }
}

#[test]
fn devices_that_are_described_in_full_are_kept() {
    let device = "uart { device-type = \"platform\"; device-name = \"serial8250\"; };";
    let with = format!("memory-bytes = /bits/ 64 <0x10000000>; devices {{ {device} }};");
    let tree =
        dts::read(&CHANGE.replacen("memory-bytes = /bits/ 64 <0x10000000>;", &with, 1)).unwrap();
    let (overlay, report) = read(&tree);
    assert!(report.is_valid(), "{report}");
    let path = "/fragment@0/__overlay__/instance-create/resources";
    let written = written(&overlay);
    assert_eq!(
        written.node(&format!("{path}/devices")),
        tree.node(&format!("{path}/devices"))
    );
    assert!(
        written
            .node(path)
            .unwrap()
            .property("memory-base")
            .is_some()
    );
}

/// `instance-create` has `cpus` twice: the kernel uses the first. A past version kept the second, which became the
/// value of another property when the overlay was written.
#[test]
fn what_is_said_twice_is_refused_by_name_and_written_once() {
    let blob = include_bytes!("../../fuzz/corpus/overlay/twice");
    let tree = dtb::read(blob).unwrap();
    let (overlay, report) = check::overlay(&tree, None);
    let told = report
        .findings()
        .iter()
        .find(|told| told.rule == Rule::OverlayContent && told.property.as_deref() == Some("cpus"));
    assert!(told.is_some(), "{report}");
    let (again, _) = check::overlay(&overlay.to_tree(), None);
    assert_eq!(again, overlay);
}
