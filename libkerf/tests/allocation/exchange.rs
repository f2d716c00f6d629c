//! The resources that move after a morph.

use libkerf::allocate::{self, Exchange, Handover, NoExchange};
use libkerf::check::Rule;
use libkerf::overlay::{Operation, Status, Target};
use proptest::prelude::*;

use crate::ground::{BLOCK, RINGS, count, ground, plain_ground};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn an_exchange_is_as_planned_or_a_true_reason(
        ground in ground(),
        running in any::<bool>(),
        everything in any::<bool>(),
        blocks in 0_u64..8,
        odd in prop::sample::select(&[0, 0, 0, 4096_u64][..]),
        some in 0_usize..4,
    ) {
        let mut state = ground.state.clone();
        if running {
            state = state.with_status("i3", Status::Active);
        }
        let giver = state.system.instance("i2").unwrap().clone();
        let getter = state.system.instance("i3").unwrap().clone();
        let some = giver.cpus.iter().copied().take(some).collect();
        let handover = match everything {
            true => Handover::Everything,
            false => Handover::These { cpus: some, devices: Vec::new() },
        };
        let exchange = Exchange {
            from: "i2".to_owned(),
            to: "i3".to_owned(),
            handover: handover.clone(),
            memory: blocks * BLOCK + odd,
        };
        match allocate::plan(&state, &exchange) {
            Ok(overlay) => {
                let after = state.apply(&overlay).unwrap();
                let now = after.system.instance("i3").unwrap();
                prop_assert_eq!(now.memory_bytes, getter.memory_bytes + exchange.memory);
                let gained = match handover {
                    Handover::Everything => giver.cpus.clone(),
                    Handover::These { cpus, .. } => cpus,
                };
                let mut expected = [getter.cpus.clone(), gained].concat();
                let mut has = now.cpus.clone();
                expected.sort_unstable();
                has.sort_unstable();
                prop_assert_eq!(has, expected);
                prop_assert_eq!(after.system.instance("i2").is_none(), everything);
                prop_assert!(after.check().is_valid(), "{}", after.check());
                prop_assert!(overlay.to_blob().unwrap().len() <= 4096);
                for operation in overlay.fragments.iter().flat_map(|f| &f.operations) {
                    if let (Operation::MemoryAdd(moves), true) = (operation, running) {
                        let aligned = |m: &libkerf::overlay::MemoryMove| {
 m.base.unwrap().is_multiple_of(BLOCK) && m.size.is_multiple_of(BLOCK) };
                        prop_assert!(moves.iter().all(aligned));
                    }
                }
            }
            Err(NoExchange::Memory { wanted, block }) => {
                let returned = if everything { giver.memory_bytes } else { 0 };
                let free = count(&ground).free_memory + returned;
                prop_assert_eq!(block, if running { BLOCK } else { 4096 });
                // The last block of each chunk is incomplete.
                let chunks = ground.state.system.resources.chunks.len() as u64;
                let in_blocks = free - chunks * (BLOCK - RINGS);
                let can_be_had = if running { in_blocks } else { free };
                let is_whole = wanted.is_multiple_of(block);
                prop_assert!(wanted > can_be_had || !is_whole, "{} of {}", wanted, can_be_had);
            }
            Err(NoExchange::Refused(report)) => {
                // No memory would be left for the kernel's own use.
                let returned = if everything { giver.memory_bytes } else { 0 };
                prop_assert!(report.breaks(Rule::MemoryFillsPool), "{}", report);
                prop_assert_eq!(exchange.memory, count(&ground).free_memory + returned);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

#[test]
fn an_instance_with_a_kernel_gives_nothing_up() {
    let ground = plain_ground();
    let state = ground.state.with_status("i2", Status::Loaded);
    let exchange = Exchange {
        from: "i2".to_owned(),
        to: "i3".to_owned(),
        handover: Handover::Everything,
        memory: 0,
    };
    match allocate::plan(&state, &exchange) {
        Err(NoExchange::Refused(report)) => assert!(report.breaks(Rule::InstanceRunning)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_running_kernel_gets_no_memory_that_may_be_in_use() {
    let mut ground = plain_ground();
    for instance in &mut ground.state.system.instances {
        instance.regions.clear();
    }
    let state = ground.state.with_status("i3", Status::Active);
    let exchange = Exchange {
        from: "i2".to_owned(),
        to: "i3".to_owned(),
        handover: Handover::These {
            cpus: vec![0],
            devices: Vec::new(),
        },
        memory: BLOCK,
    };
    assert_eq!(allocate::plan(&state, &exchange), Err(NoExchange::Unplaced));
}

#[test]
fn an_exchange_takes_before_it_gives() {
    let ground = plain_ground();
    let exchange = Exchange {
        from: "i2".to_owned(),
        to: "i3".to_owned(),
        handover: Handover::These {
            cpus: vec![0],
            devices: Vec::new(),
        },
        memory: 0,
    };
    let overlay = allocate::plan(&ground.state, &exchange).unwrap();
    let targets: Vec<_> = overlay.fragments.iter().map(|f| f.target.clone()).collect();
    assert_eq!(
        targets,
        [
            Target::Instance("i2".to_owned()),
            Target::Instance("i3".to_owned())
        ]
    );
}
