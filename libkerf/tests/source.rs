//! Source text: the same bytes as from dtc, and errors with line and column.

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

/// Returns the bytes that dtc makes of a text; `None` if dtc refuses the text.
fn dtc_reads(text: &str) -> Option<Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text.dts");
    std::fs::write(&file, text).unwrap();
    let output = Command::new("dtc")
        .args(["-q", "-q", "-I", "dts", "-O", "dtb"])
        .arg(file)
        .output()
        .expect("dtc is installed by scripts/setup");
    output.status.success().then_some(output.stdout)
}

/// Sources without their first line, `/dts-v1/;`.
const CORNERS: &[&str] = &[
    // Deletions: dtc takes a new node as written, and merges another one into an existing node.
    "/ { a; /delete-property/ a; };",
    "/ { }; / { a; /delete-property/ a; };",
    "/ { /delete-property/ a; a = <1>; };",
    "/ { n { }; /delete-node/ n; };",
    "/ { /delete-node/ n; n { }; };",
    "/ { }; / { n { }; /delete-node/ n; };",
    "/ { n { }; /delete-property/ a; };",
    "/ { /delete-node/ n; a; };",
    "/ { a = <1>; b; }; / { /delete-property/ a; a = <2>; };",
    "/ { n { x; }; m { }; }; / { /delete-node/ n; n { y; x; }; };",
    "/ { n { a; k { }; }; m { }; }; / { /delete-node/ n; }; / { n { k { }; }; };",
    "/ { l: n { }; m { }; }; /delete-node/ &l; / { l: o { }; };",
    "/ { l: n { }; }; /delete-node/ &l; / { a = &l; };",
    "/ { l: n { }; }; / { l: o { }; }; /delete-node/ &{/n}; &l { x; };",
    "/ { n { l: k { }; }; }; /delete-node/ &{/n}; &l { x; };",
    // A merge allows repetitions.
    "/ { a; a; };",
    "/ { }; / { a = <1>; a = <2>; n { x; }; n { y; }; };",
    "/ { n { }; n { }; };",
    // Phandles.
    "/ { a = <&l &m>; l: n { linux,phandle = <1>; }; m: m { }; };",
    "/ { a = <&l &m>; l: n { linux,phandle = <0x2000>; }; m: m { }; };",
    "/ { n { phandle = <3>; linux,phandle = <3>; }; };",
    "/ { n { phandle = <3>; linux,phandle = <4>; }; };",
    "/ { l: n { phandle = <&l>; }; };",
    "/ { l: n { phandle = <&{/n}>; }; m { phandle = <1>; }; };",
    "/ { l: n { }; m { phandle = <&l>; }; };",
    "/ { n { phandle = <0>; }; };",
    "/ { n { phandle = <(-1)>; }; };",
    "/ { n { phandle = <1 2>; }; };",
    "/ { n { phandle = <1>; }; m { linux,phandle = <1>; }; };",
    // The boot CPU.
    "/ { cpus { cpu@900 { reg = <0x900>; }; cpu@1 { reg = <1>; }; }; };",
    "/ { cpus { cpu@900 { reg = <0x0 0x900>; }; }; };",
    "/ { l: cpus { cpu@9 { reg = <&l>; }; }; };",
    "/ { cpus { cpu@9 { reg = <9>; }; cpu@8 { reg = <8>; }; }; }; / { cpus { /delete-node/ cpu@9; }; };",
    "/ { cpus@1 { cpu@9 { reg = <9>; }; }; };",
    // Names.
    "/ { name = \"\"; n@1 { name = \"n\"; }; };",
    "/ { n@1 { name = \"n@1\"; }; };",
    "/ { n { name = [6e]; }; };",
    "/ { \\a = <1>; \\n { }; \\delete-node { }; };",
    "/ { \\ = <1>; };",
    "/ { a@b = <1>; };",
    "/ { n#1 { }; };",
    "/ { n@1@2 { }; };",
    "/ { a#b?c*d+e = <1>; };",
    // Nodes that are omitted without a reference.
    "/ { /omit-if-no-ref/ l: n { }; };",
    "/ { l: /omit-if-no-ref/ n { }; a = <&l>; };",
    "/ { /omit-if-no-ref/ l: n { k { }; a = &l; }; };",
    "/ { /omit-if-no-ref/ l: n { k = <&m>; }; m: m { }; };",
    "/ { l: n { }; }; /omit-if-no-ref/ &l;",
    "/ { n { }; }; / { /omit-if-no-ref/ n { }; };",
    "/ { /omit-if-no-ref/ a; };",
    "/ { n { }; }; /omit-if-no-ref/ &m;",
    // Line markers, and comments.
    "# 1 \"x.dtsi\"\n/ { };",
    "#line 7 \"a \\\" b\" 1 2\n/ { # 2 \"y\"\n };",
    "/ {\n# 2 \"y\"\n#size-cells = <1>;\n};",
    "/ {\n#\t3\t\"y\" 1\na;\n};",
    "/ { a = <1\n# 1 \"x\"\n2>; };",
    "/ { }; // no newline",
    "/ { }; // newline\n",
    // Labels.
    "l: / { };",
    "/ { a: b: n { }; }; c: &a { x; }; &c { y; };",
    "/ { n { }; }; a: b: &{/n} { };",
    "/ { l: a; l: n { }; };",
    "/ { l: a = <1>; b = l: <2>; };",
    "/ { a = l1: <l2: 1 l3:> l4:, l5: [l6: 01 l7:] l8:; };",
    "/ { a = [ab: 12 34cd:]; };",
    "/ { a = [12cd34]; };",
    "/ { a = [12 3]; };",
    "/ { a = [12g4]; };",
    "/ { l: a = <1>; }; / { l: a = <2>; };",
    // The rest.
    "/dts-v1/; / { };",
    "&{/} { }; / { };",
    "/ { a = /bits/ (8) <1>; };",
    "/ { a = <(1 << 64) (1 >> 65) (1 << 63)>; };",
    "/ { a = <0x100000000>; };",
    "/memreserve/ 1 2; m: /memreserve/ 0x10 (3 + 4); / { };",
    "/ { a = &{/}, &{/n/}; b = <&{/n}>; n { }; };",
];

#[test]
fn corners_of_the_language_are_as_in_dtc() {
    let mut wrong = Vec::new();
    for corner in CORNERS {
        let text = format!("/dts-v1/;\n{corner}");
        let text = match corner.ends_with("no newline") {
            true => text,
            false => text + "\n",
        };
        let ours = dts::read(&text).map(|tree| dtb::write(&tree).unwrap());
        let theirs = dtc_reads(&text);
        if ours.as_ref().ok() != theirs.as_ref() {
            let by = theirs.map_or("refused by dtc", |_| "read by dtc");
            wrong.push(format!("{corner}\n  {by}; ours: {ours:x?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Returns true if the tree was written as text; the text must read back as the same tree.
fn is_written_right(tree: &DeviceTree) -> bool {
    match dts::write(tree) {
        Ok(text) => {
            let again = dts::read(&text).expect("what was written can be read");
            assert_eq!(again.root(), tree.root());
            let theirs = dtc_reads(&text).expect("dtc reads it too");
            assert_eq!(dtb::read(&theirs).unwrap().root(), tree.root());
            true
        }
        Err(_) => false,
    }
}

#[test]
fn what_cannot_be_read_is_not_written() {
    use libkerf::tree::Node;
    let of = |node: Node| DeviceTree::new(Node::new("").with_child(node));
    let two = |name: &str| {
        let child = || Node::new(name).with_u32("phandle", 7);
        DeviceTree::new(
            Node::new("")
                .with_child(child())
                .with_child(child().with_flag("x")),
        )
    };
    // A node with a duplicate property, which only a blob can have.
    let blob = dtb::write(&of(Node::new("n").with_u32("a", 1).with_u32("b", 2))).unwrap();
    let at = blob.windows(4).rposition(|w| w == b"a\0b\0").unwrap();
    let mut twice = blob.clone();
    twice[at + 2] = b'a';
    let refused = [
        two("n"),
        of(Node::new("n@1@2")),
        of(Node::new("n#")),
        of(Node::new("n").with_flag("a@b")),
        of(Node::new("n").with_u32("phandle", 0)),
        of(Node::new("n").with_u32("phandle", u32::MAX)),
        of(Node::new("n").with_flag("phandle")),
        of(Node::new("n")
            .with_u32("phandle", 1)
            .with_u32("linux,phandle", 2)),
        of(Node::new("n").with_text("name", "n")),
        of(Node::new("n").with_text("name", "m")),
        DeviceTree::new(
            Node::new("")
                .with_child(Node::new("n").with_u32("phandle", 7))
                .with_child(Node::new("m").with_u32("phandle", 7)),
        ),
        dtb::read(&twice).unwrap(),
    ];
    for (number, tree) in refused.iter().enumerate() {
        assert!(!is_written_right(tree), "{number}");
    }
    assert_eq!(dts::write(&two("n")).unwrap_err().path.as_str(), "/");
    assert!(is_written_right(&of(Node::new("line")
        .with_flag("#")
        .with_flag("#line"))));
}

#[test]
fn the_blobs_boot_cpu_is_in_a_comment() {
    let text = "/dts-v1/;\n/ { cpus { cpu@9 { reg = <9>; }; }; };\n";
    let blob = dtb::write(&dts::read(text).unwrap()).unwrap();
    let printed = dts::write(&dtb::read(&blob).unwrap()).unwrap();
    assert!(printed.contains("// boot_cpuid_phys: 0x9\n"), "{printed}");
    assert_eq!(dts::read(&printed).unwrap(), dtb::read(&blob).unwrap());
}

#[test]
fn reading_ends_when_it_is_not_wanted_any_more() {
    use std::cell::Cell;
    let text = format!("/dts-v1/;\n/ {{ a = <{}>; }};\n", "1 ".repeat(100_000));
    let asked = Cell::new(0);
    let twice = || {
        asked.set(asked.get() + 1);
        asked.get() < 3
    };
    let error = dts::read_while(&text, &twice).unwrap_err();
    assert_eq!(error.fault, DtsFault::Stopped);
    assert_eq!(asked.get(), 3, "it was not asked again");
    assert!(error.position.column < 20_000, "{}", error.position);
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
