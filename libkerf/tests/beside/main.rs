//! Side by side with the real kerf and the real dtc, on thousands of generated trees. kerf and libkerf reach the same
//! verdict, or a rule says why not; dtc and libkerf make the same bytes. `scripts/fetch-kerf` installs kerf.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod dtc;
mod generate;
mod kerf;
mod old;

use std::collections::BTreeMap;

use generate::Case;
use kerf::{As, Kerf};
use libkerf::check::{self, Context, Report, Severity, Stance};
use libkerf::machine::{Cpu, Iomem, Machine};
use libkerf::model::Instance;
use libkerf::tree::Node;
use libkerf::{dtb, dts};

/// Number of generated trees.
const TREES: u64 = 6000;

fn judge(case: &Case) -> Report {
    let cpu = |id| Cpu {
        id,
        logical: u32::try_from(id).ok(),
        node: 0,
        package: 0,
        core: 0,
    };
    let machine = Machine::new((0..32).map(cpu)).with_iomem(Iomem {
        chunks: case.iomem.clone(),
        used: Vec::new(),
    });
    let context = Context {
        machine: Some(&machine),
    };
    // libkerf reads the same bytes as kerf.
    let tree = dtb::read(&dtb::write(&case.tree).unwrap()).unwrap();
    match case.kind {
        As::Baseline => check::baseline(&tree, context).1,
        As::System => check::system(&tree, context).1,
        As::Instance => check::instance(&tree).1,
        As::Overlay => check::overlay(&tree, None).1,
    }
}

#[test]
fn kerf_and_libkerf_differ_only_where_a_rule_says_so() {
    let mut kerf = Kerf::start();
    let (mut same, mut taken) = (0, 0);
    let (mut differences, mut wrong) = (BTreeMap::new(), Vec::new());
    for seed in 0..TREES {
        let case = generate::case(seed);
        let report = judge(&case);
        let blob = dtb::write(&case.tree).unwrap();
        let reason = kerf.refuses(case.kind, &case.iomem, &blob);
        if report.kerf_refuses() != reason.is_some() {
            wrong.push(format!(
                "tree {seed}, {:?}: kerf: {}\nlibkerf:\n{report}\n{}",
                case.kind,
                reason.as_deref().unwrap_or("takes it"),
                dts::write(&case.tree).unwrap(),
            ));
        }
        taken += u64::from(reason.is_none());
        if report.is_valid() == reason.is_none() {
            same += 1;
        }
        for finding in report.findings() {
            let ours = finding.severity == Severity::Error;
            if ours != (finding.kerf == Stance::Refuses) {
                *differences.entry(finding.rule.id()).or_insert(0) += 1;
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {TREES}, the first: {}",
        wrong.len(),
        wrong[..wrong.len().min(3)].join("\n")
    );
    println!("{TREES} trees: kerf takes {taken}; the same verdict on {same}");
    println!("rules on which they differ: {differences:?}");
    // Neither all valid nor all invalid: either would prove little.
    assert!(
        taken > TREES / 4 && taken < TREES * 3 / 4,
        "kerf takes {taken}"
    );
    assert!(same > TREES / 2, "the same verdict on {same}");
}

/// As source text and as bytes, each generated tree means the same to dtc and to libkerf, or both refuse the tree.
#[test]
fn dtc_and_libkerf_make_the_same_of_every_tree() {
    let (mut same, mut refused, mut wrong) = (0, 0, Vec::new());
    for seed in 0..TREES {
        let tree = generate::case(seed).tree;
        let blob = dtb::write(&tree).unwrap();
        let difference = match dts::write(&tree) {
            Ok(text) => {
                same += 1;
                let ours = dts::read(&text).map(|tree| dtb::write(&tree).unwrap());
                let theirs = dtc::compiled("dts", text.as_bytes());
                match (ours, theirs) {
                    (Ok(ours), Some(theirs)) if ours == theirs && ours == blob => None,
                    (ours, theirs) => Some(format!("{text}\nours {ours:x?}\ndtc {theirs:x?}")),
                }
            }
            Err(why) => {
                refused += 1;
                let theirs = dtc::compiled("dtb", &blob);
                theirs.map(|_| format!("not written, because {why}; dtc reads the bytes"))
            }
        };
        wrong.extend(difference.map(|difference| format!("tree {seed}: {difference}")));
    }
    println!(
        "{TREES} trees: dtc makes the same bytes of {same}, and refuses {refused} with libkerf"
    );
    assert!(
        wrong.is_empty(),
        "{} of {TREES}, the first: {}",
        wrong.len(),
        wrong[0]
    );
    assert!(
        refused > TREES / 100 && same > TREES / 2,
        "{same}, {refused}"
    );
}

/// Returns the overlays and trees that kerf creates, by name.
fn made_by_kerf() -> BTreeMap<String, Vec<u8>> {
    let output = kerf::python("make.py").output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut rest = output.stdout.as_slice();
    let mut made = BTreeMap::new();
    while let Some((name_length, after)) = rest.split_first_chunk::<2>() {
        let (length, after) = after.split_first_chunk::<4>().unwrap();
        let (name, after) = after.split_at(u16::from_be_bytes(*name_length).into());
        let (blob, after) = after.split_at(u32::from_be_bytes(*length) as usize);
        made.insert(String::from_utf8(name.to_vec()).unwrap(), blob.to_vec());
        rest = after;
    }
    made
}

/// Returns the tree without unit addresses (after the `@`), which are never read, and with operations in a fixed order:
/// the kernel has its own order.
fn without_units(node: &Node) -> Node {
    let name = node.name().split('@').next().unwrap_or_default();
    let mut plain = Node::new(name);
    for property in node.properties() {
        plain.set(property.clone());
    }
    let mut children: Vec<Node> = node.children().iter().map(without_units).collect();
    if name == "__overlay__" {
        children.sort_by(|one, other| one.name().cmp(other.name()));
    }
    plain.with_children(children)
}

#[test]
fn what_kerf_makes_is_read_and_made_the_same() {
    let made = made_by_kerf();
    assert_eq!(made.len(), 6);
    let (system, report) =
        check::baseline(&dtb::read(&made["baseline"]).unwrap(), Context::default());
    assert_eq!(report.findings(), [], "{report}");
    assert_eq!(system.resources.devices[0].alias.as_deref(), Some("enp9s0"));
    for name in ["create", "remove", "grow", "shrink", "pool"] {
        let tree = dtb::read(&made[name]).unwrap();
        let (overlay, report) = check::overlay(&tree, None);
        assert!(report.is_valid(), "{name}: {report}");
        let ours = overlay.to_tree();
        assert_eq!(
            without_units(ours.root()),
            without_units(tree.root()),
            "{name}"
        );
    }
}

#[test]
fn what_libkerf_makes_kerf_takes() {
    let mut kerf = Kerf::start();
    for name in ["baseline", "pool", "instance"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trees");
        let text = std::fs::read_to_string(path.join(format!("{name}.dts"))).unwrap();
        let kind = match name {
            "baseline" => As::Baseline,
            "pool" => As::System,
            _ => As::Instance,
        };
        let blob = dtb::write(&dts::read(&text).unwrap()).unwrap();
        assert_eq!(kerf.refuses(kind, &[], &blob), None, "{name}");
    }
    let instance = Instance {
        name: "web".to_owned(),
        id: Some(3),
        cpus: vec![8, 10],
        memory_base: Some(1 << 32),
        memory_bytes: 1 << 28,
        // Two devices, because kerf does not read a list of them.
        devices: vec!["nic0".to_owned(), "nic1".to_owned()],
        ..Instance::default()
    };
    let blob = dtb::write(&instance.to_tree()).unwrap();
    assert_eq!(kerf.refuses(As::Instance, &[], &blob), None);
}
