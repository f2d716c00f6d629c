//! Source text: the bytes that dtc makes of it, and errors that name line and column.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::path::PathBuf;
use std::process::Command;

use libkerf::dts::{self, DtsFault};
use libkerf::{dtb, tree::DeviceTree};

fn trees() -> Vec<PathBuf> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/trees");
    let mut trees: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    trees.sort();
    trees
}

fn dtc(arguments: &[&str], file: &std::path::Path) -> Vec<u8> {
    let output = Command::new("dtc")
        .args(arguments)
        .arg(file)
        .output()
        .expect("dtc is installed by scripts/setup");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

#[test]
fn the_same_source_gives_the_bytes_of_dtc() {
    for path in trees() {
        let ours = dtb::write(&dts::read(&std::fs::read_to_string(&path).unwrap()).unwrap());
        let theirs = dtc(&["-q", "-q", "-I", "dts", "-O", "dtb"], &path);
        assert_eq!(ours.unwrap(), theirs, "{}", path.display());
    }
}

#[test]
fn what_is_printed_means_the_same_to_dtc() {
    let directory = tempfile::tempdir().unwrap();
    for path in trees() {
        let blob = dtc(&["-q", "-q", "-I", "dts", "-O", "dtb"], &path);
        let printed = directory.path().join("printed.dts");
        std::fs::write(&printed, dts::write(&dtb::read(&blob).unwrap()).unwrap()).unwrap();
        let again = dtc(&["-q", "-q", "-I", "dts", "-O", "dtb"], &printed);
        assert_eq!(again, blob, "{}", path.display());
    }
}

#[test]
fn an_unchanged_text_is_written_back_as_it_was() {
    for path in trees() {
        let text = std::fs::read_to_string(path).unwrap();
        let mut tree = dts::read(&text).unwrap();
        assert_eq!(dts::write(&tree).unwrap(), text);
        tree.root_mut();
        let printed = dts::write(&tree).unwrap();
        assert_eq!(dts::read(&printed).unwrap(), tree);
    }
}

fn refused(text: &str) -> (usize, usize, DtsFault) {
    let error = dts::read(text).expect_err(text);
    (error.position.line, error.position.column, error.fault)
}

#[test]
fn errors_name_their_place() {
    let cases: &[(&str, usize, usize)] = &[
        ("", 1, 1),
        ("/dts-v1/", 1, 9),
        ("/dts-v1/;\n/ { a = <1 zz>; };", 2, 12),
        ("/dts-v1/;\n/ { a = <0x100000000>; };", 2, 10),
        ("/dts-v1/;\n/ {\n\ta = \"x;\n};", 3, 7),
        ("/dts-v1/;\n/ { /* no end };", 2, 5),
        ("/dts-v1/;\n/ { a = <&nowhere>; };", 2, 11),
        ("/dts-v1/;\n/ { a = &{/nowhere}; };", 2, 10),
        ("/dts-v1/;\n/ { a; a; };", 2, 8),
        ("/dts-v1/;\n/ { n { }; n { }; };", 2, 12),
        ("/dts-v1/;\n/ { n { }; a; };", 2, 12),
        ("/dts-v1/;\n/ { a = <(1 / 0)>; };", 2, 13),
        ("/dts-v1/;\n/ { a = [0 1]; };", 2, 10),
        ("/dts-v1/;\n/ { a = <08>; };", 2, 10),
        ("/dts-v1/;\n/ { a }", 2, 7),
        ("/dts-v1/;\n&gone { };", 2, 1),
        ("/dts-v1/;\n/ { a = <1>; } / { };", 2, 16),
    ];
    for (text, line, column) in cases {
        let (at_line, at_column, fault) = refused(text);
        assert_eq!((at_line, at_column), (*line, *column), "{text:?}: {fault}");
    }
}

#[test]
fn depth_of_nodes_and_parentheses_is_bounded() {
    let nodes = format!("/dts-v1/; / {} {};", "{ n ".repeat(100), "}; ".repeat(100));
    assert_eq!(refused(&nodes).2, DtsFault::Depth);
    let parentheses = format!("/dts-v1/; / {{ a = <{}1>; }};", "(".repeat(100_000));
    assert_eq!(refused(&parentheses).2, DtsFault::Depth);
    let signs = format!("/dts-v1/; / {{ a = <({}1)>; }};", "-".repeat(100_000));
    assert_eq!(refused(&signs).2, DtsFault::Depth);
    let choices = format!(
        "/dts-v1/; / {{ a = <({}1)>; }};",
        "1 ? 1 : ".repeat(100_000)
    );
    assert_eq!(refused(&choices).2, DtsFault::Depth);
}

#[test]
fn the_text_form_of_kerf_is_named() {
    let fault = refused("/* old */ /multikernel-v1/;\n/ { };").2;
    assert_eq!(fault, DtsFault::KerfText);
}

#[test]
fn overlays_for_the_generic_format_are_told_apart() {
    let fault = refused("/dts-v1/; /plugin/; / { };").2;
    assert!(matches!(fault, DtsFault::Unsupported("/plugin/", _)));
}

#[test]
fn a_name_that_text_cannot_write_is_refused() {
    let tree = DeviceTree::new(libkerf::tree::Node::new("").with_flag("has space"));
    let error = dts::write(&tree).unwrap_err();
    assert_eq!(error.name, "has space");
    // A blob may give its root a name.
    let named = DeviceTree::new(libkerf::tree::Node::new("host"));
    assert_eq!(dts::write(&named).unwrap_err().name, "host");
}
