//! Reshapes a live pool to a baseline, and keeps the resources in use.

use libkerf::check::{self, Context};
use libkerf::dts;
use libkerf::model::{MemoryRequest, Resources};
use libkerf::overlay::{NoChange, Operation, State};

const GIB: u64 = 1 << 30;

/// Returns the state of `system.dts`: 2 GiB on node 0, with both instances, and 1 GiB on node 1.
fn state() -> State {
    let tree = dts::read(include_str!("../trees/system.dts")).unwrap();
    State::new(check::system(&tree, Context::default()).0)
}

/// Returns the pool's resources with only the memory replaced.
fn wanted(memory: &str) -> Resources {
    let state = state();
    Resources {
        requests: MemoryRequest::parse_list(memory).unwrap(),
        chunks: Vec::new(),
        ..state.system.resources
    }
}

fn operations(wanted: &Resources) -> Vec<Operation> {
    let state = state();
    let overlay = state.reshape(wanted).unwrap();
    let made = state.apply(&overlay).unwrap();
    assert!(made.check().is_valid(), "{}", made.check());
    let fragments = overlay.fragments.into_iter();
    fragments.flat_map(|fragment| fragment.operations).collect()
}

fn added(operations: &[Operation]) -> Vec<(u64, Option<u32>)> {
    let Some(Operation::MemoryAdd(items)) = operations.first() else {
        panic!("{operations:?}");
    };
    items.iter().map(|item| (item.size, item.node)).collect()
}

#[test]
fn a_pool_that_is_as_wanted_is_left_alone() {
    assert_eq!(operations(&wanted("2GB@0,1GB@1")), []);
    assert_eq!(operations(&wanted("3GB")), []);
}

#[test]
fn each_node_gets_what_it_lacks() {
    assert_eq!(added(&operations(&wanted("3GB@0,1GB@1"))), [(GIB, Some(0))]);
    assert_eq!(
        added(&operations(&wanted("2GB@0,1GB@1,1GB@2"))),
        [(GIB, Some(2))]
    );
    // If no node is named, the memory of node 1 counts as well.
    assert_eq!(added(&operations(&wanted("5GB"))), [(2 * GIB, None)]);
}

#[test]
fn chunks_go_back_whole_and_those_in_use_stay() {
    let state = state();
    let chunks = &state.system.resources.chunks;
    let of_node = |node| {
        chunks
            .iter()
            .find(|chunk| chunk.node == Some(node))
            .unwrap()
    };
    let given = operations(&wanted("2GB@0"));
    let [Operation::MemoryRemove(items)] = given.as_slice() else {
        panic!("{given:?}");
    };
    assert_eq!(items.len(), 1);
    assert_eq!(
        (items[0].base, items[0].size),
        (Some(of_node(1).base), of_node(1).size)
    );
    // A part of a chunk cannot be removed, nor a chunk in use by instances.
    assert_eq!(operations(&wanted("2GB@0,512MB@1")), []);
    assert_eq!(operations(&wanted("1GB@0,1GB@1")), []);
}

#[test]
fn while_it_is_not_known_where_memory_is_all_chunks_stay() {
    let mut state = state();
    state.system.instances[0].memory_base = None;
    let overlay = state.reshape(&wanted("2GB@0")).unwrap();
    assert!(overlay.is_empty(), "{overlay:?}");
}

#[test]
fn cpus_come_and_go_but_not_those_of_an_instance() {
    let state = state();
    let mut wants = wanted("2GB@0,1GB@1");
    let free = state.system.free_cpus();
    wants.cpus.retain(|cpu| *cpu != free[0]);
    wants.cpus.push(100);
    let made = state.apply(&state.reshape(&wants).unwrap()).unwrap();
    let sorted = |mut cpus: Vec<u64>| {
        cpus.sort_unstable();
        cpus
    };
    assert_eq!(
        sorted(made.system.resources.cpus),
        sorted(wants.cpus.clone())
    );
    let taken = state.system.instances[0].cpus[0];
    wants.cpus.retain(|cpu| *cpu != taken);
    assert!(matches!(state.reshape(&wants), Err(NoChange::Refused(_))));
}
