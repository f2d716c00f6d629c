//! The overlay that changes one system into another.

use std::collections::BTreeSet;

use libkerf::model::{Instance, System};
use libkerf::overlay::{NoChange, Status};
use proptest::prelude::*;

use crate::ground::{BLOCK, build, ground, plain_ground};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// CPUs move between pool and instances in any way, and the overlay produces exactly the wanted system.
    #[test]
    fn the_overlay_of_a_change_makes_it(ground in ground(), turns in prop::collection::vec((any::<prop::sample::Index>(), 0..4_usize), 0..6)) {
        let mut after = ground.state.system.clone();
        let pool = after.resources.cpus.clone();
        for (which, owner) in turns {
            if pool.is_empty() {
                break;
            }
            let cpu = pool[which.index(pool.len())];
            for instance in &mut after.instances {
                instance.cpus.retain(|there| *there != cpu);
            }
            if let Some(instance) = after.instances.get_mut(owner) {
                instance.cpus.push(cpu);
            }
        }
        let overlay = ground.state.overlay_to(&after).unwrap();
        let made = ground.state.apply(&overlay).unwrap().system;
        let sets = |system: &System| -> Vec<BTreeSet<u64>> {
            system.instances.iter().map(|i| i.cpus.iter().copied().collect()).collect()
        };
        prop_assert_eq!(sets(&made), sets(&after));
        prop_assert_eq!(sets(&after) == sets(&ground.state.system), overlay.is_empty());
    }
}

#[test]
fn an_instance_grows_and_shrinks_by_whole_regions() {
    let ground = build(2, 2, &[2, 1, 1, 1, 1, 1, 1, 1], &[3, 0, 0], &[8, 8]);
    let state = ground.state.with_status("i2", Status::Active);
    let to = |bytes: u64| {
        let mut after = state.system.clone();
        after.instances[0].memory_bytes = bytes;
        state.overlay_to(&after)
    };
    let overlay = to(5 * BLOCK).unwrap();
    let made = state.apply(&overlay).unwrap();
    assert_eq!(made.system.instances[0].memory_bytes, 5 * BLOCK);
    assert!(made.check().is_valid(), "{}", made.check());
    let overlay = to(2 * BLOCK).unwrap();
    let made = state.apply(&overlay).unwrap();
    assert_eq!(
        made.system.instances[0].regions,
        state.system.instances[0].regions[..2]
    );
    assert_eq!(
        to(2 * BLOCK + 4096),
        Err(NoChange::Regions {
            name: "i2".to_owned(),
            bytes: BLOCK - 4096
        })
    );
    assert_eq!(
        to(3 * BLOCK + 4096),
        Err(NoChange::Memory {
            bytes: 4096,
            block: BLOCK
        })
    );
}

#[test]
fn creating_and_removing_is_a_change_too() {
    let ground = plain_ground();
    let mut after = ground.state.system.clone();
    let gone = after.instances.remove(0);
    let new = Instance {
        name: "new".to_owned(),
        cpus: gone.cpus.clone(),
        memory_bytes: gone.memory_bytes,
        ..Instance::default()
    };
    after.instances.push(new);
    let overlay = ground.state.overlay_to(&after).unwrap();
    let made = ground.state.apply(&overlay).unwrap().system;
    assert!(made.instance("i2").is_none());
    assert_eq!(made.instance("new").unwrap().cpus, gone.cpus);
    let mut renumbered = ground.state.system.clone();
    renumbered.instances[0].id = Some(77);
    let refused = ground.state.overlay_to(&renumbered).unwrap_err();
    assert!(matches!(refused, NoChange::Fixed { what: "id", .. }));
}
