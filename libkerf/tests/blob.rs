//! Blobs: writing a blob after reading reproduces its bytes, and an invalid blob is refused with the place of the
//! fault.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::path::PathBuf;

use libkerf::dtb::{self, DtbFault};
use libkerf::dts;
use libkerf::tree::{DeviceTree, MAX_DEPTH, Node};
use proptest::prelude::*;

fn blob_of(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/trees")
        .join(name);
    let tree = dts::read(&std::fs::read_to_string(path).unwrap()).unwrap();
    dtb::write(&tree).unwrap()
}

fn pool() -> Vec<u8> {
    blob_of("pool.dts")
}

/// Returns the blob with one cell of its header replaced.
fn with_header(field: usize, value: u32) -> Vec<u8> {
    let mut blob = pool();
    blob[field * 4..field * 4 + 4].copy_from_slice(&value.to_be_bytes());
    blob
}

fn first_token(blob: &[u8]) -> usize {
    u32::from_be_bytes(blob[8..12].try_into().unwrap()) as usize
}

/// Inserts bytes into the structure block, and corrects the header.
fn insert(blob: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    blob.splice(at..at, bytes.iter().copied());
    for field in [1, 3, 9] {
        let cell = &mut blob[field * 4..field * 4 + 4];
        let value = u32::from_be_bytes(cell.try_into().unwrap());
        let size = u32::try_from(bytes.len()).unwrap();
        cell.copy_from_slice(&(value + size).to_be_bytes());
    }
}

fn fault_of(blob: &[u8]) -> DtbFault {
    dtb::read(blob).expect_err("it is broken").fault
}

#[test]
fn an_unchanged_tree_is_written_back_byte_for_byte() {
    // A no-op token before the first property, and unused space after the blocks.
    let mut blob = pool();
    let at = first_token(&blob) + 8;
    insert(&mut blob, at, &4_u32.to_be_bytes());
    blob.extend_from_slice(&[0xaa; 64]);
    let size = u32::try_from(blob.len()).unwrap();
    blob[4..8].copy_from_slice(&size.to_be_bytes());
    assert_eq!(dtb::write(&dtb::read(&blob).unwrap()).unwrap(), blob);
}

#[test]
fn a_change_that_was_taken_back_gives_the_same_bytes() {
    let blob = pool();
    let mut tree = dtb::read(&blob).unwrap();
    let added = Node::new("note").with_u32("unheard-of", 1);
    tree.root_mut().push(added);
    let changed = dtb::write(&tree).unwrap();
    assert_ne!(changed, blob);
    tree.root_mut().remove_child("note");
    let back = dtb::write(&tree).unwrap();
    assert_eq!(back, blob, "strings keep their places");
    assert_eq!(
        dtb::read(&changed).unwrap().node("/note").unwrap().name(),
        "note"
    );
}

#[test]
fn unknown_parts_survive_a_change_elsewhere() {
    let mut tree = dtb::read(&pool()).unwrap();
    tree.root_mut()
        .child_mut("resources")
        .unwrap()
        .push(Node::new("virtio").with_child(Node::new("blk").with_u32("from-the-future", 7)));
    let mut again = dtb::read(&dtb::write(&tree).unwrap()).unwrap();
    again
        .root_mut()
        .child_mut("resources")
        .unwrap()
        .remove_property("cpus-available");
    let last = dtb::read(&dtb::write(&again).unwrap()).unwrap();
    let kept = last.node("/resources/virtio/blk").unwrap();
    assert_eq!(kept.property("from-the-future").unwrap().u32(), Ok(7));
}

#[test]
fn every_field_of_the_header_is_checked() {
    assert_eq!(fault_of(&with_header(0, 7)), DtbFault::Magic(7));
    assert!(matches!(
        fault_of(&with_header(1, 1 << 30)),
        DtbFault::TooLarge(_)
    ));
    assert!(matches!(
        fault_of(&with_header(1, 39)),
        DtbFault::Short { need: 40, .. }
    ));
    let longer = u32::try_from(pool().len() + 1).unwrap();
    assert!(matches!(
        fault_of(&with_header(1, longer)),
        DtbFault::Short { .. }
    ));
    for field in [2, 3, 8, 9] {
        let fault = fault_of(&with_header(field, 0xffff_fff0));
        assert!(
            matches!(fault, DtbFault::Block { .. }),
            "field {field}: {fault:?}"
        );
    }
    assert!(matches!(
        fault_of(&with_header(2, 0x39)),
        DtbFault::Alignment(_)
    ));
    assert!(matches!(
        fault_of(&with_header(4, 0x2c)),
        DtbFault::Alignment(_)
    ));
    assert!(matches!(
        fault_of(&with_header(5, 16)),
        DtbFault::Version { .. }
    ));
    assert!(matches!(
        fault_of(&with_header(6, 18)),
        DtbFault::Version { .. }
    ));
}

#[test]
fn a_cut_blob_is_refused_at_every_length() {
    let blob = pool();
    for length in 0..blob.len() {
        let error = dtb::read(&blob[..length]).expect_err("it is cut");
        assert!(
            matches!(error.fault, DtbFault::Short { .. }),
            "{length}: {error}"
        );
    }
}

#[test]
fn an_error_names_the_byte() {
    let mut blob = pool();
    let structure = first_token(&blob);
    blob[structure + 11] = 0x77;
    let error = dtb::read(&blob).unwrap_err();
    assert_eq!(error.offset, structure + 8);
    assert_eq!(error.fault, DtbFault::Token(0x77));
    assert_eq!(
        error.to_string(),
        format!(
            "device tree blob, byte {:#x}: unknown token 0x77",
            structure + 8
        )
    );
}

#[test]
fn depth_is_bounded_both_ways() {
    let nested = |depth| (1..depth).fold(Node::new("n"), |n, _| Node::new("n").with_child(n));
    let with_root = |mut node: Node| {
        let child = std::mem::take(node.children_mut());
        DeviceTree::new(Node::new("").with_children(child))
    };
    let deepest = dtb::write(&with_root(nested(MAX_DEPTH))).unwrap();
    assert_eq!(dtb::read(&deepest).unwrap().root().depth(), MAX_DEPTH);
    let error = dtb::write(&with_root(nested(MAX_DEPTH + 1))).unwrap_err();
    assert_eq!(error.fault, DtbFault::Depth);
    // One more node, inserted into the deepest blob by hand.
    let at = deepest.windows(4).rposition(|w| w == b"n\0\0\0").unwrap() + 4;
    let mut blob = deepest.clone();
    let node = [&1_u32.to_be_bytes()[..], b"n\0\0\0", &2_u32.to_be_bytes()].concat();
    insert(&mut blob, at, &node);
    assert_eq!(fault_of(&blob), DtbFault::Depth);
}

#[test]
fn a_property_after_a_child_is_refused() {
    let tree = DeviceTree::new(Node::new("").with_child(Node::new("a")).with_flag("b"));
    let mut blob = dtb::write(&tree).unwrap();
    // Swap the property (12 bytes) and the child (12 bytes).
    let at = first_token(&blob) + 8;
    blob[at..at + 24].rotate_left(12);
    assert!(matches!(fault_of(&blob), DtbFault::Order(_)));
}

#[test]
fn names_that_would_break_a_path_are_not_written() {
    for name in ["", "a/b", "a\0b", &"x".repeat(256)] {
        let node = DeviceTree::new(Node::new("").with_child(Node::new(name)));
        let property = DeviceTree::new(Node::new("").with_flag(name));
        for tree in [node, property] {
            let fault = dtb::write(&tree).unwrap_err().fault;
            assert_eq!(fault, DtbFault::Unwritable(name.to_owned()));
        }
    }
}

fn node_name() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9,._+-]{0,12}(@[0-9a-f]{1,4})?"
}

fn property_name() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9,._+*#?-]{0,12}"
}

fn node() -> impl Strategy<Value = Node> {
    let properties = prop::collection::vec(
        (property_name(), prop::collection::vec(any::<u8>(), 0..20)),
        0..5,
    );
    let leaf = (node_name(), properties).prop_map(|(name, properties)| {
        properties
            .into_iter()
            .fold(Node::new(name), |node, (name, value)| {
                node.with_property(libkerf::tree::Property::new(name, value))
            })
    });
    leaf.prop_recursive(4, 40, 4, |inner| {
        (inner.clone(), prop::collection::vec(inner, 0..4)).prop_map(|(mut node, children)| {
            for child in children {
                if node
                    .children()
                    .iter()
                    .all(|there| there.name() != child.name())
                {
                    node.push(child);
                }
            }
            node
        })
    })
}

proptest! {
    #[test]
    fn any_tree_survives_blob_and_source(child in node()) {
        let tree = DeviceTree::new(Node::new("").with_child(child));
        let blob = dtb::write(&tree).unwrap();
        let read = dtb::read(&blob).unwrap();
        prop_assert_eq!(&read, &tree);
        prop_assert_eq!(dtb::write(&read).unwrap(), blob.clone());
        let source = dts::write(&tree).unwrap();
        let again = dts::read(&source).unwrap();
        prop_assert_eq!(again.root(), tree.root());
        prop_assert_eq!(dtb::write(&again).unwrap(), blob);
    }

    #[test]
    fn bytes_turned_at_random_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
    ) {
        let mut blob = pool();
        for (index, value) in flips {
            let at = index.index(blob.len());
            blob[at] = value;
        }
        if let Ok(tree) = dtb::read(&blob) {
            prop_assert_eq!(dtb::write(&tree).unwrap(), &blob[..]);
            let mut changed = tree.clone();
            changed.root_mut();
            // Writing from the structure also works, and gives the same tree.
            if let Ok(written) = dtb::write(&changed) {
                prop_assert_eq!(dtb::read(&written).unwrap(), tree);
            }
        }
    }
}
