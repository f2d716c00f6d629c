//! CPUs and memory of a new instance.

use std::collections::BTreeSet;

use libkerf::allocate::{self, Nodes, Request, Shortage, Siblings};
use libkerf::check::{self, Rule, SLACK_BYTES};
use libkerf::model::Instance;
use libkerf::overlay::{Operation, Overlay};
use proptest::prelude::*;

use crate::ground::{BLOCK, Ground, MIB, count, ground, plain_ground};

fn request() -> impl Strategy<Value = Request> {
    let nodes = prop_oneof![
        Just(Nodes::PreferOne),
        Just(Nodes::One),
        (0_u32..3).prop_map(Nodes::This)
    ];
    let siblings = prop_oneof![Just(Siblings::Together), Just(Siblings::Apart)];
    (0_usize..14, 0_u64..24, any::<bool>(), nodes, siblings).prop_map(
        |(cpus, blocks, odd, nodes, siblings)| Request {
            name: "new".to_owned(),
            id: None,
            cpus,
            memory: blocks * BLOCK / 2 + u64::from(odd && blocks % 7 == 0) * 100,
            nodes,
            siblings,
        },
    )
}

fn created(overlay: &Overlay) -> Instance {
    match overlay.fragments[0].operations.as_slice() {
        [Operation::Create(create)] => create.instance.clone(),
        other => panic!("{other:?}"),
    }
}

fn check_choice(
    ground: &Ground,
    request: &Request,
    overlay: &Overlay,
) -> Result<(), TestCaseError> {
    let counted = count(ground);
    let instance = created(overlay);
    let chosen: BTreeSet<u64> = instance.cpus.iter().copied().collect();
    prop_assert_eq!(instance.cpus.len(), request.cpus);
    prop_assert_eq!(chosen.len(), request.cpus, "each CPU once");
    prop_assert_eq!(instance.memory_bytes, request.memory);
    let system = &ground.state.system;
    for other in &system.instances {
        prop_assert!(
            other.cpus.iter().all(|cpu| !chosen.contains(cpu)),
            "a CPU of {}",
            other.name
        );
        if request.siblings == Siblings::Together {
            let core = |cpu: &u64| ground.machine.cpu(*cpu).unwrap().core;
            let theirs: BTreeSet<u32> = other.cpus.iter().map(core).collect();
            prop_assert!(
                chosen.iter().all(|cpu| !theirs.contains(&core(cpu))),
                "a core of {}",
                other.name
            );
        }
    }
    prop_assert!(
        chosen.iter().all(|cpu| system.resources.cpus.contains(cpu)),
        "all are of the pool"
    );
    let nodes: BTreeSet<u32> = chosen
        .iter()
        .map(|cpu| ground.machine.cpu(*cpu).unwrap().node)
        .collect();
    match request.nodes {
        Nodes::This(node) => prop_assert_eq!(&nodes, &BTreeSet::from([node])),
        Nodes::One => prop_assert_eq!(nodes.len(), 1),
        Nodes::PreferOne if counted.some_node_has(request) => prop_assert_eq!(nodes.len(), 1),
        Nodes::PreferOne => prop_assert!(instance.numa_nodes.is_empty()),
    }
    if let [node] = instance.numa_nodes.as_slice() {
        prop_assert_eq!(
            &nodes,
            &BTreeSet::from([*node]),
            "memory is where the CPUs are"
        );
    }
    // The kernel would accept the overlay, and the resulting state breaks no rule.
    let (read, report) = check::overlay(&overlay.to_tree(), Some(&ground.state));
    prop_assert!(report.is_valid(), "{}", report);
    prop_assert_eq!(&read, overlay);
    let after = ground
        .state
        .apply(overlay)
        .map_err(|report| TestCaseError::fail(report.to_string()))?;
    prop_assert!(after.check().is_valid(), "{}", after.check());
    prop_assert!(!after.check().breaks(Rule::MemoryFillsPool));
    prop_assert!(!after.check().breaks(Rule::PoolSlack));
    Ok(())
}

fn check_reason(
    ground: &Ground,
    request: &Request,
    shortage: &Shortage,
) -> Result<(), TestCaseError> {
    let counted = count(ground);
    let usable = counted.usable(request.siblings, None);
    let is_true = match shortage {
        Shortage::Senseless(_) => {
            request.cpus == 0 || request.memory == 0 || !request.memory.is_multiple_of(4096)
        }
        Shortage::Cpus { wanted, free } => {
            (*wanted, *free) == (request.cpus, counted.free) && wanted > free
        }
        Shortage::Cores {
            usable: said, free, ..
        } => {
            request.siblings == Siblings::Together
                && (*said, *free) == (usable, counted.free)
                && (usable..counted.free).contains(&(request.cpus - 1))
        }
        Shortage::Memory { free, .. } => {
            let kept = SLACK_BYTES * ground.state.system.instances.len() as u64;
            let usable = counted.free_memory.saturating_sub(kept);
            *free == u128::from(usable) && usable < request.memory + SLACK_BYTES
        }
        Shortage::Node { node, .. } => match (request.nodes, node) {
            (Nodes::This(asked), Some(node)) => asked == *node && !counted.node_has(request, asked),
            (Nodes::One, None) => !counted.some_node_has(request),
            _ => false,
        },
        Shortage::NameTaken(_) | Shortage::IdTaken { .. } => false,
    };
    prop_assert!(is_true, "{:?} {}", shortage, shortage);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_choice_is_what_was_asked_for_or_a_true_reason(ground in ground(), request in request()) {
        match allocate::instance(&ground.state, &ground.machine, &request) {
            Ok(overlay) => check_choice(&ground, &request, &overlay)?,
            Err(shortage) => check_reason(&ground, &request, &shortage)?,
        }
    }

    #[test]
    fn instances_that_are_made_one_after_the_other_share_nothing(
        ground in ground(),
        requests in prop::collection::vec(request(), 1..6),
    ) {
        let mut ground = ground;
        for (number, request) in requests.into_iter().enumerate() {
            let request = Request { name: format!("new{number}"), ..request };
            if let Ok(overlay) = allocate::instance(&ground.state, &ground.machine, &request) {
                ground.state = ground.state.apply(&overlay).unwrap();
            }
        }
        let report = ground.state.check();
        prop_assert!(report.is_valid(), "{}", report);
    }
}

fn wanted(cpus: usize, memory: u64) -> Request {
    Request {
        name: "new".to_owned(),
        cpus,
        memory,
        ..Request::default()
    }
}

#[test]
fn siblings_stay_together_unless_asked() {
    let ground = plain_ground();
    let all = wanted(7, MIB);
    let shortage = allocate::instance(&ground.state, &ground.machine, &all).unwrap_err();
    assert_eq!(
        shortage.to_string(),
        "7 CPUs are wanted; 6 of the 7 free ones share no core with another instance"
    );
    let apart = Request {
        siblings: Siblings::Apart,
        ..all
    };
    let overlay = allocate::instance(&ground.state, &ground.machine, &apart).unwrap();
    assert_eq!(created(&overlay).cpus.len(), 7);
    // Two CPUs are one whole core, of the node with fewer free CPUs.
    let overlay = allocate::instance(&ground.state, &ground.machine, &wanted(2, MIB)).unwrap();
    assert_eq!(
        (created(&overlay).cpus, created(&overlay).numa_nodes),
        (vec![8, 9], vec![0])
    );
}

#[test]
fn names_and_ids_that_are_taken_are_refused() {
    let ground = plain_ground();
    let mut request = wanted(1, MIB);
    request.name = "i2".to_owned();
    let shortage = allocate::instance(&ground.state, &ground.machine, &request).unwrap_err();
    assert_eq!(shortage, Shortage::NameTaken("i2".to_owned()));
    request.name = "new".to_owned();
    request.id = Some(2);
    let shortage = allocate::instance(&ground.state, &ground.machine, &request).unwrap_err();
    assert!(matches!(shortage, Shortage::IdTaken { id: 2, .. }));
}
