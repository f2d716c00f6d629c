//! Checks trees against every rule that the kernel and `kerf` enforce, and reports all violations at once.
//!
//! A [`Report`] holds the findings. `docs/libkerf.md` shows the reactions of kernel and kerf to each [`Rule`], and
//! the differences between the two and this crate, from the same table.

mod instances;
mod pool;
mod report;
mod resources;
mod rule;
mod usage;

pub use instances::{MAX_ID, MAX_KERF_ID};
pub(crate) use instances::{check_id, check_name};
pub use report::{Finding, MAX_FINDINGS, Report};
pub use rule::{Rule, Severity, Stance};
pub use usage::SLACK_BYTES;

use crate::dtb::MAX_BLOB_BYTES;
use crate::machine::Machine;
use crate::model::{At, Instance, Kind, Reader, System};
use crate::overlay::{MAX_OVERLAY_BYTES, Overlay, State};
use crate::tree::{DeviceTree, NodePath};

/// Additional information for a check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context<'a> {
    /// The machine of the tree. Without it, the checks against the machine's hardware are skipped.
    pub machine: Option<&'a Machine>,
}

/// Checks a baseline: the tree that is written once to create a pool.
#[must_use]
pub fn baseline(tree: &DeviceTree, context: Context<'_>) -> (System, Report) {
    let mut report = Report::default();
    expect_kind(tree, Kind::Baseline, &mut report);
    let system = System::read(
        tree,
        &mut Reader {
            report: &mut report,
        },
    );
    let root = At::root(tree.root());
    resources::of_baseline(&root, &system, context, &mut report);
    if !system.instances.is_empty() {
        let names: Vec<&str> = system.instances.iter().map(|i| i.name.as_str()).collect();
        report.push(Finding::new(
            Rule::BaselineInstances,
            NodePath::from("/instances"),
            format!("instances {}", crate::model::list(&names)),
            "take them out, and create them by overlays",
        ));
    }
    instances::check(&system, system.resources.memory_bytes(), &mut report);
    if let Ok(blob) = crate::dtb::write(tree)
        && blob.len() > MAX_BLOB_BYTES
    {
        let problem = format!("{} bytes", blob.len());
        let advice = format!("the kernel takes at most {MAX_BLOB_BYTES}");
        report.push(Finding::new(
            Rule::BlobTooLarge,
            NodePath::root(),
            problem,
            advice,
        ));
    }
    (system, report)
}

/// Checks a pool and its instances: a pool as read back, or a baseline with planned instances.
#[must_use]
pub fn system(tree: &DeviceTree, context: Context<'_>) -> (System, Report) {
    let mut report = Report::default();
    let kind = Kind::of(tree);
    if kind != Kind::Pool {
        expect_kind(tree, Kind::Baseline, &mut report);
    }
    let system = System::read(
        tree,
        &mut Reader {
            report: &mut report,
        },
    );
    let root = At::root(tree.root());
    match kind {
        Kind::Pool => resources::of_pool(&root, &system, context, &mut report),
        _ => resources::of_baseline(&root, &system, context, &mut report),
    }
    instances::check(&system, system.resources.memory_bytes(), &mut report);
    (system, report)
}

/// Checks a pool and instances that were read one by one from the kernel, or that overlays changed
/// afterwards. Requested memory of the pool counts as present.
#[must_use]
pub fn assembled(system: &System) -> Report {
    let mut report = Report::default();
    instances::check(system, system.resources.expected_bytes(), &mut report);
    report
}

/// Checks the tree that the kernel serves for one instance.
#[must_use]
pub fn instance(tree: &DeviceTree) -> (Option<Instance>, Report) {
    let mut report = Report::default();
    let instance = Instance::read_own(
        tree,
        &mut Reader {
            report: &mut report,
        },
    );
    if let Some(instance) = &instance {
        instances::check_own(instance, &NodePath::root(), &mut report);
    }
    (instance, report)
}

/// Checks an overlay: its form and, if a state is given, its effect in the kernel.
#[must_use]
pub fn overlay(tree: &DeviceTree, state: Option<&State>) -> (Overlay, Report) {
    let mut report = Report::default();
    let kind = Kind::of(tree);
    if kind != Kind::Overlay {
        let problem = "this is not an overlay";
        let advice = "set the root's compatible to linux,multikernel-overlay, and add fragments";
        report.push(Finding::new(
            Rule::UnknownKind,
            NodePath::root(),
            problem,
            advice,
        ));
    }
    let overlay = Overlay::read(
        tree,
        &mut Reader {
            report: &mut report,
        },
    );
    if let Ok(blob) = crate::dtb::write(tree)
        && blob.len() > MAX_OVERLAY_BYTES
    {
        let problem = format!("{} bytes", blob.len());
        let advice = format!(
            "the kernel takes {MAX_OVERLAY_BYTES} at a time and cuts the rest: split it into several"
        );
        report.push(Finding::new(
            Rule::BlobTooLarge,
            NodePath::root(),
            problem,
            advice,
        ));
    }
    if let Some(state) = state {
        state.clone().run(&overlay, &mut report);
    }
    (overlay, report)
}

fn expect_kind(tree: &DeviceTree, expected: Kind, report: &mut Report) {
    let kind = Kind::of(tree);
    let (problem, kernel, kerf) = match kind {
        Kind::Overlay => ("this is an overlay", Stance::Refuses, Stance::Refuses),
        Kind::Instance => (
            "this is the tree of one instance",
            Stance::Takes,
            Stance::Takes,
        ),
        Kind::Pool if expected == Kind::Baseline => {
            by_address(tree, report);
            return;
        }
        _ => return,
    };
    let advice = "give a baseline: /resources with cpus and memory@N { size }";
    let finding = Finding::new(Rule::UnknownKind, NodePath::root(), problem, advice);
    report.push(finding.judged(kernel, kerf));
}

/// Refuses a tree that was read back from the kernel as a baseline: it contains addresses.
fn by_address(tree: &DeviceTree, report: &mut Report) {
    let root = At::root(tree.root());
    let Some(resources) = root.child("resources") else {
        return;
    };
    for node in resources.node.children_with_prefix("memory@") {
        let at = resources.enter(node);
        if node.property("reg").is_some() && node.property("size").is_none() {
            let problem = "it gives an address; the kernel picks that";
            let finding = Finding::new(
                Rule::MemoryByAddress,
                at.path(),
                problem,
                "write size instead",
            );
            report.push(finding.of("reg"));
        }
    }
}
