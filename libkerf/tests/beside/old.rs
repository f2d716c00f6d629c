//! The text format of kerf 0.1, side by side with kerf 0.1.

use std::fmt::Display;
use std::io::{Read, Write};
use std::process::Stdio;

use libkerf::kerf_text::{self, KerfText};

use crate::generate::Random;

fn join<T: Display>(values: &[T]) -> String {
    let texts: Vec<String> = values.iter().map(T::to_string).collect();
    texts.join(" ")
}

fn or_dash<T: Display>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn describe(text: &KerfText) -> String {
    let resources = &text.system.resources;
    let pool = resources.chunks[0];
    let mut lines = vec![
        format!("cpus {}", join(&resources.cpus)),
        format!("memory {} {}", pool.base, pool.size),
    ];
    for device in &resources.devices {
        let functions = device.functions.as_deref().map(join).unwrap_or_default();
        let namespaces = device.namespaces.as_deref().map(join).unwrap_or_default();
        lines.push(format!("device {} {functions} / {namespaces}", device.name));
    }
    for i in &text.system.instances {
        lines.push(format!(
            "instance {} {} {} / {} {} / {} / {} {} {} {}",
            i.name,
            or_dash(i.id),
            join(&i.cpus),
            i.memory_base.unwrap_or(0),
            i.memory_bytes,
            i.devices.join(" "),
            join(&i.numa_nodes),
            or_dash(i.cpu_affinity.as_ref()),
            or_dash(i.memory_policy.as_ref()),
            u8::from(i.host_kcore),
        ));
    }
    for r in &text.system.references {
        let parent = or_dash(r.parent.as_ref());
        let (function, namespace) = (or_dash(r.function), or_dash(r.namespace));
        lines.push(format!(
            "reference {} {parent} {function} {namespace}",
            r.name
        ));
    }
    lines.join("\n")
}

const TEXT: &str = r#"/multikernel-v1/;
/ { resources {
    cpus = <4 5 6 7>;
    memory-base = <0x100000000>;
    memory-bytes = <0x0 0x40000000>;
    devices {
      eth0 { pci-id = "0000:09:00.0"; sriov-vfs = <4>; host-reserved-vf = <0>; available-vfs = <1 2 3>; };
      nvme0: storage@0 {
        compatible = "nvme";
        namespaces = <4>;
        available-ns = <2 3>;
      };
    };
  };
  instances {
    web {
      id = <1>;
      resources {
        cpus = <4 5>;
        memory-base = <0x100000000>;
        memory-bytes = <0x0 0x20000000>;
        devices = <&eth0_vf1, &nvme0_ns2>;
        numa-nodes = <0 1>;
        cpu-affinity = "compact";
        memory-policy = "bind";
      };
      options { enable-host-kcore; };
    };
    // db is small
    db {
      id = <2>;
      resources {
        cpus = <6>;
        memory-base = <120000000>;
        memory-bytes = <10000000>;
      };
    };
  };
  eth0_vf1: net-vf@1 { parent = <&eth0>; vf-id = <1>; };
  nvme0_ns2: nvme-ns@2 { parent = <&nvme0>; namespace-id = <2>; };
};
"#;

/// Returns the text with a few places changed.
fn variant(random: &mut Random) -> String {
    const PIECES: &[&str] = &[
        "{",
        "}",
        "<",
        ">",
        ";",
        "=",
        "0x",
        "1 2",
        "\n",
        "//",
        "id",
        "resources",
        " ",
        "zz",
        "\"",
        "_vf3:",
    ];
    let mut text = TEXT.to_owned();
    for _ in 0..random.below(4) {
        let at = random.below(text.len());
        let piece = PIECES[random.below(PIECES.len())];
        match random.below(3) {
            0 => text.insert_str(at, piece),
            1 => {
                let end = (at + random.below(12)).min(text.len());
                text.replace_range(at..end, "");
            }
            _ => {
                let lines: Vec<&str> = text.split('\n').collect();
                let line = random.below(lines.len());
                let kept = lines
                    .iter()
                    .enumerate()
                    .filter(|(n, _)| *n != line)
                    .map(|(_, l)| *l);
                text = kept.collect::<Vec<_>>().join("\n");
            }
        }
    }
    text
}

const TEXTS: u64 = 2500;

#[test]
fn the_text_form_is_read_as_kerf_0_1_read_it() {
    let mut texts: Vec<String> = (0..TEXTS)
        .map(|seed| variant(&mut Random::new(seed)))
        .collect();
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kerf-examples");
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "dts") {
            texts.push(std::fs::read_to_string(path).unwrap());
        }
    }
    let mut process = crate::kerf::python("old.py")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut requests, mut answers) = (
        process.stdin.take().unwrap(),
        process.stdout.take().unwrap(),
    );
    let (mut wrong, mut read) = (Vec::new(), 0);
    for text in &texts {
        requests
            .write_all(&u32::try_from(text.len()).unwrap().to_be_bytes())
            .unwrap();
        requests.write_all(text.as_bytes()).unwrap();
        let mut length = [0; 4];
        answers.read_exact(&mut length).expect("kerf 0.1 is alive");
        let mut answer = vec![0; u32::from_be_bytes(length) as usize];
        answers.read_exact(&mut answer).unwrap();
        let theirs = String::from_utf8(answer).unwrap();
        let ours = kerf_text::read(text);
        let same = match &ours {
            Ok(ours) => describe(ours) == theirs,
            Err(_) => theirs.starts_with("refused: "),
        };
        // Python's integers are unbounded; an address of 2^64 or more exists on no machine.
        let words = theirs.split_whitespace();
        if words
            .filter_map(|word| word.parse::<u128>().ok())
            .any(|n| n > u64::MAX.into())
        {
            continue;
        }
        read += u64::from(ours.is_ok());
        if !same {
            let ours = ours.map_or_else(|error| error.to_string(), |ours| describe(&ours));
            wrong.push(format!("{text}\nkerf 0.1:\n{theirs}\nlibkerf:\n{ours}\n"));
        }
    }
    drop(requests);
    assert!(process.wait().unwrap().success());
    assert!(
        wrong.is_empty(),
        "{} of {}, the first:\n{}",
        wrong.len(),
        texts.len(),
        wrong[0]
    );
    assert!(read > TEXTS / 4 && read < TEXTS, "{read} were read");
}

#[test]
fn an_example_becomes_a_baseline_of_today() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kerf-examples");
    let text = std::fs::read_to_string(path.join("numa_topology.dts")).unwrap();
    let read = kerf_text::read(&text).unwrap();
    assert!(
        read.remarks
            .iter()
            .any(|remark| remark.contains("topology")),
        "{:?}",
        read.remarks
    );
    assert!(
        read.remarks.iter().any(|remark| remark.contains("lost")),
        "{:?}",
        read.remarks
    );
    // Its devices have no vendor and device IDs, and no names: the user must supply them.
    let mut resources = read.system.resources;
    resources.devices.clear();
    let tree = resources.to_baseline();
    let (system, report) = libkerf::check::baseline(&tree, libkerf::check::Context::default());
    assert!(report.is_valid(), "{report}");
    assert_eq!(system.resources.cpus.len(), 60);
    let blob = libkerf::dtb::write(&tree).unwrap();
    let refused = crate::kerf::Kerf::start().refuses(crate::kerf::As::Baseline, &[], &blob);
    assert_eq!(refused, None);
}
