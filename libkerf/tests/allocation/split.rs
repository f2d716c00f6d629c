//! An overlay that the kernel would truncate is split into parts, which together have the same effect.

use libkerf::allocate::{self, Exchange, Handover};
use libkerf::model::{Instance, PciAddress};
use libkerf::overlay::{
    CpuMove, Create, DeviceMove, MAX_OVERLAY_BYTES, MemoryMove, Operation, Overlay, State, Target,
    Unsplittable,
};
use libkerf::tree::Node;
use proptest::prelude::*;

use crate::ground::{MIB, build};

/// Returns all operations in the kernel's order, one for each item.
fn run_order(overlays: &[Overlay]) -> Vec<(Target, &'static str, String)> {
    let mut steps = Vec::new();
    for fragment in overlays.iter().flat_map(|o| &o.fragments) {
        for name in Operation::order(&fragment.target) {
            for operation in fragment.operations.iter().filter(|o| o.name() == name) {
                let items: Vec<String> = match operation {
                    Operation::Create(create) => vec![create.instance.name.clone()],
                    Operation::Remove(name) => vec![name.clone()],
                    Operation::MemoryAdd(items) | Operation::MemoryRemove(items) => {
                        items.iter().map(|i| format!("{i:?}")).collect()
                    }
                    Operation::CpuAdd(items) | Operation::CpuRemove(items) => {
                        items.iter().map(|i| format!("{i:?}")).collect()
                    }
                    Operation::DeviceAdd(items) | Operation::DeviceRemove(items) => {
                        items.iter().map(|i| format!("{i:?}")).collect()
                    }
                };
                steps.extend(
                    items
                        .into_iter()
                        .map(|i| (fragment.target.clone(), name, i)),
                );
            }
        }
    }
    steps
}

fn operation() -> impl Strategy<Value = Operation> {
    let cpus = || {
        prop::collection::vec(any::<u32>(), 1..40).prop_map(|ids| {
            ids.into_iter()
                .map(|id| CpuMove::from(u64::from(id)))
                .collect()
        })
    };
    let memory = || {
        prop::collection::vec(1_u64..1 << 40, 1..10).prop_map(|sizes| {
            let of_size = |size| MemoryMove {
                base: Some(size << 12),
                size: size << 12,
                ..MemoryMove::default()
            };
            sizes.into_iter().map(of_size).collect()
        })
    };
    let devices = || {
        prop::collection::vec(0_u8..32, 1..10).prop_map(|slots| {
            let at = |slot| PciAddress::parse(&format!("0000:01:{slot:02x}.0")).unwrap();
            slots
                .into_iter()
                .map(|slot| DeviceMove::from(at(slot)))
                .collect()
        })
    };
    prop_oneof![
        cpus().prop_map(Operation::CpuAdd),
        cpus().prop_map(Operation::CpuRemove),
        memory().prop_map(Operation::MemoryAdd),
        memory().prop_map(Operation::MemoryRemove),
        devices().prop_map(Operation::DeviceAdd),
        devices().prop_map(Operation::DeviceRemove),
    ]
}

fn fragment() -> impl Strategy<Value = (Target, Vec<Operation>)> {
    let of_set = prop::collection::vec("[a-z]{1,20}".prop_map(Operation::Remove), 1..4);
    let target = prop_oneof![Just(Target::Pool), "[ab]".prop_map(Target::Instance)];
    prop_oneof![
        1 => of_set.prop_map(|operations| (Target::Instances, operations)),
        5 => (target, prop::collection::vec(operation(), 1..5)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn parts_are_small_and_run_the_same_in_the_same_order(
        fragments in prop::collection::vec(fragment(), 1..12),
    ) {
        let whole = Overlay::new(fragments);
        let parts = whole.split().unwrap();
        for part in &parts {
            prop_assert!(part.to_blob().unwrap().len() <= MAX_OVERLAY_BYTES);
            prop_assert!(!part.is_empty());
        }
        prop_assert_eq!(run_order(&parts), run_order(std::slice::from_ref(&whole)));
        // The number of parts is minimal: two adjacent parts together are too large for one.
        for pair in parts.windows(2) {
            let both = pair[0].to_blob().unwrap().len() + pair[1].to_blob().unwrap().len();
            prop_assert!(both > MAX_OVERLAY_BYTES);
        }
    }
}

#[test]
fn an_exchange_of_200_cpus_goes_in_parts_that_make_the_same() {
    let owners = [vec![2; 200], vec![1; 8]].concat();
    let ground = build(208, 1, &owners, &[0, 0, 0], &[8]);
    let exchange = Exchange {
        from: "i2".to_owned(),
        to: "i3".to_owned(),
        handover: Handover::Everything,
        memory: 0,
    };
    let overlay = allocate::plan(&ground.state, &exchange).unwrap();
    assert!(overlay.to_blob().unwrap().len() > MAX_OVERLAY_BYTES);
    let parts = overlay.split().unwrap();
    assert_eq!(parts.len(), 2);
    assert!(!parts[0].can_be_undone() && parts[1].can_be_undone());
    let step = |state: State, part: &Overlay| state.apply(part).unwrap();
    let made = parts.iter().fold(ground.state.clone(), step);
    assert_eq!(made, ground.state.apply(&overlay).unwrap());
    assert_eq!(made.system.instance("i3").unwrap().cpus.len(), 200);
}

fn create(instance: Instance, host_tree: Option<Node>) -> Overlay {
    let create = Create {
        instance,
        host_tree,
        ..Create::default()
    };
    Overlay::new([(Target::Instances, vec![Operation::Create(Box::new(create))])])
}

#[test]
fn an_instance_of_many_cpus_is_made_with_some_and_given_the_others() {
    let ground = build(900, 1, &[1; 900], &[0, 0, 0], &[8]);
    let instance = Instance {
        name: "large".to_owned(),
        cpus: ground.state.system.resources.cpus.clone(),
        memory_bytes: 16 * MIB,
        ..Instance::default()
    };
    let overlay = create(instance.clone(), None);
    let parts = overlay.split().unwrap();
    assert!(parts.len() > 1);
    let made = parts.iter().fold(ground.state.clone(), |state, part| {
        assert!(part.to_blob().unwrap().len() <= MAX_OVERLAY_BYTES);
        state.apply(part).unwrap()
    });
    assert_eq!(made.system.instance("large").unwrap().cpus, instance.cpus);
    // The host's tree is indivisible.
    let host = Node::new("host-tree").with_property(libkerf::tree::Property::new("x", [7; 5000]));
    assert!(matches!(
        create(instance, Some(host)).split(),
        Err(Unsplittable::TooLarge {
            operation: "instance-create",
            bytes: 9000..
        })
    ));
}
