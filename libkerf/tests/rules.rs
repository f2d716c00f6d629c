//! Each rule is broken once, and the finding names the place. A tree that breaks no rule has no finding.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::HashSet;
use std::path::PathBuf;

use libkerf::check::{self, Context, Finding, Report, Rule, Severity, Stance};
use libkerf::dts;
use libkerf::machine::{Cpu, Iomem, Machine};
use libkerf::model::Kind;
use libkerf::overlay::{State, Status};
use libkerf::tree::DeviceTree;

fn text(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/trees")
        .join(name);
    std::fs::read_to_string(path).unwrap()
}

fn machine() -> Machine {
    // The host has CPUs 0 to 30, each on a core of its own.
    let cpu = |n: u32| Cpu {
        id: u64::from(n) * 2,
        logical: Some(n),
        node: n / 8,
        package: 0,
        core: n,
    };
    Machine::new((0..16).map(cpu)).with_iomem(Iomem {
        chunks: vec![(0x8_4000_0000, 0x8000_0000), (0x18_4000_0000, 0x4000_0000)],
        used: Vec::new(),
    })
}

/// Checks the tree as the kind of document that its name implies.
fn judge(name: &str, tree: &DeviceTree) -> Report {
    let machine = machine();
    let context = Context {
        machine: Some(&machine),
    };
    match name {
        "baseline.dts" => check::baseline(tree, context).1,
        "pool.dts" | "system.dts" => check::system(tree, context).1,
        "instance.dts" => check::instance(tree).1,
        _ => {
            let system = check::system(&dts::read(&text("system.dts")).unwrap(), context).0;
            // "db" runs; "web" does not.
            let state = State::new(system)
                .on(&machine)
                .with_status("db", Status::Active);
            check::overlay(tree, Some(&state)).1
        }
    }
}

/// A rule, the tree to change, the change that breaks the rule, and the place of the finding.
type Case = (
    Rule,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
);

const RES: &str = "/resources";
const WEB: &str = "/instances/web/resources";
const DB: &str = "/instances/db/resources";
const NEW: &str = "/fragment@0/__overlay__/instance-create";
const NEW_RES: &str = "/fragment@0/__overlay__/instance-create/resources";

#[rustfmt::skip]
const CASES: &[Case] = &[
    (Rule::PropertyShape, "baseline.dts", "numa-node-id = <1>", "numa-node-id = <1 2>", "/resources/memory@1", "numa-node-id"),
    (Rule::PropertyShape, "change.dts", "reg = /bits/ 64 <16>", "reg = [00]", "/fragment@1/__overlay__/cpu-add/cpu@16", "reg"),
    (Rule::OlderForm, "baseline.dts", "memory@0 {", "memory-bytes = /bits/ 64 <4096>; memory@0 {", RES, "memory-bytes"),
    (Rule::OlderForm, "change.dts", "cpu-add { cpu@16 {", "cpu-add { mk,instance = \"web\"; cpu@16 {", "/fragment@1/__overlay__/cpu-add", ""),
    (Rule::UnknownKind, "instance.dts", "model = \"web\";", "", "/", "model"),
    (Rule::BlobTooLarge, "change.dts", "fragment@0", "filler = \"FILL\"; fragment@0", "/", ""),
    (Rule::ResourcesMissing, "baseline.dts", "resources {", "resource {", "/", ""),
    (Rule::CpusMissing, "baseline.dts", "cpus = /bits/ 64 <8 10 12 14 16 18>;", "", RES, "cpus"),
    (Rule::Cpus32, "baseline.dts", "cpus = /bits/ 64 <8 10 12 14 16 18>", "cpus = <8 10 12>", RES, "cpus"),
    (Rule::Cpus32Suspected, "baseline.dts", "cpus = /bits/ 64 <8 10 12 14 16 18>", "cpus = <8 10 12 14>", RES, "cpus"),
    (Rule::CpuTwice, "baseline.dts", "<8 10 12", "<8 8 10 12", RES, "cpus"),
    (Rule::CpuBoot, "baseline.dts", "<8 10 12", "<0 8 10 12", RES, "cpus"),
    (Rule::CpuHost, "baseline.dts", "<8 10 12", "<0 8 10 12", RES, "cpus"),
    (Rule::CpuAbsent, "baseline.dts", "<8 10 12", "<9 10 12", RES, "cpus"),
    (Rule::MemoryMissing, "baseline.dts", "memory@", "memory_", RES, ""),
    (Rule::MemoryItem, "baseline.dts", "memory@0 { size = /bits/ 64 <0x80000000>;", "memory@0 {", "/resources/memory@0", "size"),
    (Rule::MemoryByAddress, "baseline.dts", "memory@0 { size = /bits/ 64 <0x80000000>", "memory@0 { reg = /bits/ 64 <0x840000000 0x80000000>", "/resources/memory@0", "reg"),
    (Rule::MemorySize, "baseline.dts", "size = /bits/ 64 <0x80000000>", "size = /bits/ 64 <0x80000001>", "/resources/memory@0", "size"),
    (Rule::MemoryNodes, "baseline.dts", "memory@0 {", "MANY memory@0 {", RES, ""),
    (Rule::PoolEmpty, "baseline.dts", "size = /bits/ 64 <0x80000000>; numa-node-id = <0>; };\n\t\tmemory@1 { size = /bits/ 64 <0x40000000>;", "size = /bits/ 64 <0>;", RES, ""),
    (Rule::NumaRange, "baseline.dts", "numa-node-id = <1>", "numa-node-id = <1024>", "/resources/memory@1", "numa-node-id"),
    (Rule::NumaName, "baseline.dts", "devices {", "topology { numa-nodes { node@x { }; }; }; devices {", "/resources/topology/numa-nodes/node@x", ""),
    (Rule::PciIncomplete, "baseline.dts", "vendor-id = <0x8086>;", "", "/resources/devices/nic", "vendor-id"),
    (Rule::PciFormat, "baseline.dts", "0000:09:00.0", "09:00.0", "/resources/devices/nic", "pci-id"),
    (Rule::PciTwice, "baseline.dts", "uart {", "twin { device-type = \"pci\"; pci-id = \"0:9:0.0\"; vendor-id = <1>; device-id = <1>; }; uart {", "/resources/devices/twin", "pci-id"),
    (Rule::DeviceType, "baseline.dts", "\"platform\"", "\"usb\"", "/resources/devices/uart", "device-type"),
    (Rule::DeviceNameless, "change.dts", "memory-bytes = /bits/ 64 <0x10000000>;", "memory-bytes = /bits/ 64 <0x10000000>; devices { d { device-type = \"platform\"; }; };", "/fragment@0/__overlay__/instance-create/resources/devices/d", ""),
    (Rule::AliasLong, "baseline.dts", "eth0 =", "abcdefghijklmnopqrstuvwxyz-012345 =", "/aliases", "abcdefghijklmnopqrstuvwxyz-012345"),
    (Rule::AliasDangling, "baseline.dts", "devices/nic\"", "devices/nix\"", "/aliases", "eth0"),
    (Rule::LlcMask, "baseline.dts", "memory@0 {", "llc-way-mask = <0>; memory@0 {", RES, "llc-way-mask"),
    (Rule::LlcSparse, "baseline.dts", "memory@0 {", "llc-way-mask = <5>; memory@0 {", RES, "llc-way-mask"),
    (Rule::BaselineInstances, "baseline.dts", "aliases {", "instances { i { id = <1>; resources { cpus = /bits/ 64 <8>; memory-base = /bits/ 64 <0>; memory-bytes = /bits/ 64 <4096>; }; }; }; aliases {", "/instances", ""),
    (Rule::PoolWithoutCpus, "pool.dts", "cpus = /bits/ 64 <8 10 12 14 16 18>;", "", RES, "cpus"),
    (Rule::PoolWithoutMemory, "pool.dts", "memory@", "chunk@", RES, ""),
    (Rule::ChunkOverlap, "pool.dts", "0x1840000000 0x40000000", "0x850000000 0x40000000", RES, "reg"),
    (Rule::ChunkForeign, "pool.dts", "0x840000000 0x80000000", "0x840000000 0x40000000", RES, "reg"),
    (Rule::FreeForeign, "pool.dts", "<12 14 16 18>", "<12 14 16 19>", RES, "cpus-available"),
    (Rule::Granule, "pool.dts", "memory-granule = /bits/ 64 <0x8000000>", "memory-granule = /bits/ 64 <0x8000001>", "/", "memory-granule"),
    (Rule::InstanceTwice, "system.dts", "db {", "TWIN db {", "/instances/db", ""),
    (Rule::InstanceName, "instance.dts", "\"web\"", "\"..\"", "/", ""),
    (Rule::NameMissing, "change.dts", "instance-name = \"new\";", "", NEW, "instance-name"),
    (Rule::IdMissing, "system.dts", "id = <3>;", "", "/instances/web", "id"),
    (Rule::IdZero, "system.dts", "id = <3>", "id = <0>", "/instances/web", "id"),
    (Rule::IdRange, "system.dts", "id = <3>", "id = <2048>", "/instances/web", "id"),
    (Rule::IdKerf, "system.dts", "id = <3>", "id = <512>", "/instances/web", "id"),
    (Rule::IdTwice, "system.dts", "id = <4>", "id = <3>", "/instances/db", "id"),
    (Rule::InstanceResources, "change.dts", "resources {\n\t\t\t\t\tcpus", "resource {\n\t\t\t\t\tcpus", NEW, ""),
    (Rule::InstanceCpusMissing, "system.dts", "cpus = /bits/ 64 <8>;", "", WEB, "cpus"),
    (Rule::InstanceCpusEmpty, "system.dts", "cpus = /bits/ 64 <8>;", "cpus;", WEB, "cpus"),
    (Rule::InstanceMemoryMissing, "system.dts", "memory-base = /bits/ 64 <0x840000000>;", "", WEB, "memory-base"),
    (Rule::InstanceMemorySize, "system.dts", "<0x10000000>;\n\t\t\t\tdevice-names = \"nic0_vf1\"", "<0x10000001>;\n\t\t\t\tdevice-names = \"nic0_vf1\"", WEB, "memory-bytes"),
    (Rule::InstanceMemoryBase, "system.dts", "memory-base = /bits/ 64 <0x850000000>", "memory-base = /bits/ 64 <0x850000010>", DB, "memory-base"),
    (Rule::CpuBeyondPool, "system.dts", "cpus = /bits/ 64 <10>", "cpus = /bits/ 64 <19>", DB, "cpus"),
    (Rule::CpuForeign, "system.dts", "cpus = /bits/ 64 <10>", "cpus = /bits/ 64 <11>", DB, "cpus"),
    (Rule::CpuShared, "system.dts", "cpus = /bits/ 64 <10>", "cpus = /bits/ 64 <8>", DB, "cpus"),
    (Rule::CpusExceedPool, "system.dts", "cpus = /bits/ 64 <10>", "cpus = /bits/ 64 <10 10 10 10 10 10>", "/instances", "cpus"),
    (Rule::MemoryOutside, "system.dts", "memory-base = /bits/ 64 <0x850000000>", "memory-base = /bits/ 64 <0x8b8000000>", DB, "memory-base"),
    (Rule::MemoryOverlap, "system.dts", "memory-base = /bits/ 64 <0x850000000>", "memory-base = /bits/ 64 <0x848000000>", DB, "memory-base"),
    (Rule::MemoryExceedsPool, "system.dts", "<0x10000000>;\n\t\t\t\tdevice-names = \"nic1\"", "<0x100000000>;\n\t\t\t\tdevice-names = \"nic1\"", "/instances", "memory-bytes"),
    (Rule::MemoryFillsPool, "system.dts", "<0x10000000>;\n\t\t\t\tdevice-names = \"nic1\"", "<0xb0000000>;\n\t\t\t\tdevice-names = \"nic1\"", "/instances", "memory-bytes"),
    (Rule::PoolSlack, "system.dts", "<0x10000000>;\n\t\t\t\tdevice-names = \"nic1\"", "<0xaffff000>;\n\t\t\t\tdevice-names = \"nic1\"", "/instances", "memory-bytes"),
    (Rule::DeviceUnknown, "system.dts", "\"nic1\"", "\"nic7\"", DB, "device-names"),
    (Rule::DeviceShared, "system.dts", "\"nic1\"", "\"0000:09:00.0_vf1\"", DB, "device-names"),
    (Rule::FunctionName, "system.dts", "\"nic1\"", "\"nic0_vf\"", DB, "device-names"),
    (Rule::FunctionUnavailable, "system.dts", "\"nic1\"", "\"nic0_vf3\"", DB, "device-names"),
    (Rule::DeviceNamesList, "system.dts", "\"nic1\"", "\"nic1\", \"nic0_vf2\"", DB, "device-names"),
    (Rule::ReferenceDangling, "system.dts", "instances {", "nic0_vf9 { parent = \"nic0\"; vf-id = <9>; }; instances {", "/nic0_vf9", "parent"),
    (Rule::NumaAbsent, "system.dts", "cpus = /bits/ 64 <10>;", "cpus = /bits/ 64 <10>; numa-nodes = <2>;", DB, "numa-nodes"),
    (Rule::PolicyUnknown, "system.dts", "cpus = /bits/ 64 <10>;", "cpus = /bits/ 64 <10>; cpu-affinity = \"wide\";", DB, "cpu-affinity"),
    (Rule::BindNowhere, "system.dts", "cpus = /bits/ 64 <10>;", "cpus = /bits/ 64 <10>; memory-policy = \"bind\";", DB, "memory-policy"),
    (Rule::LlcWithoutPool, "system.dts", "llc-way-mask = <0xff0>;", "", WEB, "llc-way-mask"),
    (Rule::LlcOutside, "system.dts", "llc-way-mask = <0xc0>", "llc-way-mask = <0x1000>", DB, "llc-way-mask"),
    (Rule::LlcShared, "system.dts", "llc-way-mask = <0xc0>", "llc-way-mask = <0x60>", DB, "llc-way-mask"),
    (Rule::Virtio, "change.dts", "memory-bytes = /bits/ 64 <0x10000000>;", "memory-bytes = /bits/ 64 <0x10000000>; virtio { blk { device-id = <2>; }; };", "/fragment@0/__overlay__/instance-create/resources/virtio/blk", ""),
    (Rule::FragmentMissing, "change.dts", "fragment@", "fragment_", "/", ""),
    (Rule::FragmentUnit, "change.dts", "fragment@1", "fragment@x1", "/fragment@x1", ""),
    (Rule::FragmentTwice, "change.dts", "fragment@1", "fragment@00", "/fragment@00", ""),
    (Rule::TargetMissing, "change.dts", "target-path = \"/resources\";", "", "/fragment@2", "target-path"),
    (Rule::TargetUnsupported, "change.dts", "\"/resources\"", "\"/memory\"", "/fragment@2", "target-path"),
    (Rule::TargetUnknown, "change.dts", "\"/instances/web\"", "\"/instances/gone\"", "/fragment@1/__overlay__", ""),
    (Rule::OverlayMissing, "change.dts", "__overlay__ {\n\t\t\tmemory-add", "overlay {\n\t\t\tmemory-add", "/fragment@1", ""),
    (Rule::OverlayContent, "change.dts", "cpu-add { cpu@16 {", "cpu-add { cpu@16 { socket = <1>;", "/fragment@1/__overlay__/cpu-add/cpu@16", "socket"),
    (Rule::OperationUnknown, "change.dts", "cpu-add { cpu@16", "cpu-give { cpu@16", "/fragment@1/__overlay__/cpu-give", ""),
    (Rule::OperationMisplaced, "change.dts", "\"/instances/web\"", "\"/instances\"", "/fragment@1/__overlay__/cpu-add", ""),
    (Rule::ItemIgnored, "change.dts", "cpu-add { cpu@16", "cpu-add { core@16", "/fragment@1/__overlay__/cpu-add/core@16", ""),
    (Rule::InstanceTaken, "change.dts", "\"new\"", "\"db\"", NEW, ""),
    (Rule::IdTaken, "change.dts", "id = <5>", "id = <4>", NEW, ""),
    (Rule::InstanceRunning, "change.dts", "__overlay__ {\n\t\t\tinstance-create", "__overlay__ {\n\t\t\tinstance-remove { instance-name = \"db\"; }; instance-create", "/fragment@0/__overlay__/instance-remove", ""),
    (Rule::CpuNotFree, "change.dts", "<12 14>", "<12 10>", NEW, ""),
    (Rule::CpuNotHeld, "change.dts", "cpu@8 { reg = /bits/ 64 <8>", "cpu@8 { reg = /bits/ 64 <10>", "/fragment@1/__overlay__/cpu-remove", ""),
    (Rule::DeviceNotFree, "change.dts", "0000:0b:00.0", "0000:0a:00.0", "/fragment@2/__overlay__/device-add", ""),
    (Rule::DeviceNotHeld, "change.dts", "device-add {", "device-remove { pci@0 { pci-id = \"0000:0c:00.0\"; }; }; device-add {", "/fragment@2/__overlay__/device-remove", ""),
    (Rule::MemoryNotFree, "change.dts", "memory-bytes = /bits/ 64 <0x10000000>", "memory-bytes = /bits/ 64 <0x100000000>", NEW, ""),
    (Rule::MemoryNotHeld, "change.dts", "memory-add { memory@0 { size", "memory-remove { memory@0 { reg = /bits/ 64 <0x840000000 0x40000000>; }; }; memory-add { memory@0 { size", "/fragment@2/__overlay__/memory-remove", ""),
    (Rule::MemoryGranule, "change.dts", "\"/instances/web\";\n\t\t__overlay__ {\n\t\t\tmemory-add { memory@0 { reg = /bits/ 64 <0x860000000 0x8000000>; }; };\n\t\t\tcpu-remove { cpu@8 { reg = /bits/ 64 <8>; }; };", "\"/instances/db\";\n\t\t__overlay__ {\n\t\t\tmemory-add { memory@0 { reg = /bits/ 64 <0x860001000 0x8000000>; }; };", "/fragment@1/__overlay__/memory-add", ""),
    (Rule::ChosenContent, "change.dts", "chosen {", "chosen { bootargs = \"x\";", "/fragment@0/__overlay__/instance-create/chosen", ""),
    (Rule::DeviceNamesCreate, "change.dts", "cpus = /bits/ 64 <12 14>;", "cpus = /bits/ 64 <12 14>; device-names = \"nic0\";", NEW_RES, "device-names"),
    (Rule::BaseIgnored, "change.dts", "", "", NEW_RES, "memory-base"),
    (Rule::KerfCannotRead, "change.dts", "memory-base = /bits/ 64 <0>;", "", NEW_RES, "memory-base"),
];

/// Rules that no source text can break, because dtc would refuse the two nodes or values of one kind, or because only a
/// blob can have such numbers. They have tests of their own below.
const ELSEWHERE: &[Rule] = &[Rule::MemoryOverflow];

fn broken(case: &Case) -> DeviceTree {
    let (rule, name, from, to, ..) = case;
    let original = text(name);
    assert!(
        original.contains(from),
        "{}: {from:?} is not in {name}",
        rule.id()
    );
    let many: String = (10..1100)
        .map(|n| format!("memory@{n} {{ size = /bits/ 64 <4096>; }};"))
        .collect();
    let changed = original
        .replace(from, to)
        .replace("FILL", &"x".repeat(5000))
        .replace("MANY", &many)
        .replace("TWIN", "");
    let mut tree = dts::read(&changed).unwrap_or_else(|error| panic!("{}: {error}", rule.id()));
    if to.starts_with("TWIN") {
        let instances = tree.root_mut().child_mut("instances").unwrap();
        let twin = instances.child("db").unwrap().clone();
        instances.push(twin);
    }
    tree
}

#[test]
fn each_rule_is_found_where_it_is_broken() {
    let mut wrong = Vec::new();
    for case in CASES {
        let (rule, name, _, _, path, property) = case;
        let report = judge(name, &broken(case));
        let property = Some((*property).to_owned()).filter(|property| !property.is_empty());
        let is_it =
            |f: &&Finding| f.rule == *rule && f.path.as_str() == *path && f.property == property;
        match report.findings().iter().find(is_it) {
            Some(found) if found.suggestion.is_empty() => {
                wrong.push(format!("{}: no suggestion", rule.id()))
            }
            Some(_) => {}
            None => wrong.push(format!(
                "{} is not found at {path}, {property:?}:\n{report}",
                rule.id()
            )),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn each_rule_has_a_case() {
    let mut cases: HashSet<Rule> = CASES.iter().map(|case| case.0).collect();
    cases.extend(ELSEWHERE);
    let without: Vec<_> = Rule::ALL
        .iter()
        .filter(|rule| !cases.contains(rule))
        .collect();
    assert!(without.is_empty(), "{without:?}");
}

#[test]
fn trees_that_break_no_rule_have_no_finding() {
    for name in ["baseline.dts", "pool.dts", "system.dts", "instance.dts"] {
        let report = judge(name, &dts::read(&text(name)).unwrap());
        assert_eq!(report.findings(), [], "{name}: {report}");
    }
    let report = judge("change.dts", &dts::read(&text("change.dts")).unwrap());
    assert!(report.is_valid(), "{report}");
    assert_eq!(report.findings().len(), 1, "{report}");
}

#[test]
fn memory_that_ends_above_all_addresses_is_refused() {
    let mut tree = dts::read(&text("system.dts")).unwrap();
    let resources = tree.root_mut().child_mut("resources").unwrap();
    for memory in resources
        .children_mut()
        .iter_mut()
        .filter(|n| n.name().starts_with("memory@"))
    {
        memory.remove_property("reg");
        memory.set(libkerf::tree::Property::new(
            "size",
            0x4000_0000_u64.to_be_bytes(),
        ));
    }
    resources.remove_property("cpus-available");
    let web = tree
        .root_mut()
        .child_mut("instances")
        .unwrap()
        .child_mut("web")
        .unwrap();
    let base = (u64::MAX - 4095).to_be_bytes();
    web.child_mut("resources")
        .unwrap()
        .set(libkerf::tree::Property::new("memory-base", base));
    assert!(judge("system.dts", &tree).breaks(Rule::MemoryOverflow));
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let changed = text("baseline.dts")
        .replace("<8 10 12", "<0 8 8 10 12")
        .replace("0x80000000", "0x80000001")
        .replace("\"pci\"", "\"usb\"")
        .replace("numa-node-id = <1>", "numa-node-id = <5000>");
    let report = judge("baseline.dts", &dts::read(&changed).unwrap());
    for rule in [
        Rule::CpuHost,
        Rule::CpuTwice,
        Rule::MemorySize,
        Rule::DeviceType,
        Rule::NumaRange,
    ] {
        assert!(report.breaks(rule), "{}: {report}", rule.id());
    }
    assert!(report.errors().count() >= 3);
    assert!(report.warnings().count() >= 2);
}

#[test]
fn kinds_are_told_apart() {
    let kinds = [
        ("baseline.dts", Kind::Baseline),
        ("pool.dts", Kind::Pool),
        ("system.dts", Kind::Pool),
        ("instance.dts", Kind::Instance),
        ("overlay.dts", Kind::Overlay),
    ];
    for (name, kind) in kinds {
        assert_eq!(Kind::of(&dts::read(&text(name)).unwrap()), kind, "{name}");
    }
    let overlay = dts::read(&text("overlay.dts")).unwrap();
    let report = check::baseline(&overlay, Context::default()).1;
    assert!(report.breaks(Rule::UnknownKind));
}

#[test]
fn what_only_kerf_refuses_is_a_warning_and_says_so() {
    let report = judge(
        "system.dts",
        &broken(CASES.iter().find(|c| c.0 == Rule::DeviceNamesList).unwrap()),
    );
    assert!(report.is_valid() && report.kerf_refuses() && !report.kernel_refuses());
    let finding = report
        .findings()
        .iter()
        .find(|f| f.rule == Rule::DeviceNamesList)
        .unwrap();
    assert_eq!(
        (finding.severity, finding.kerf),
        (Severity::Warning, Stance::Refuses)
    );
}
