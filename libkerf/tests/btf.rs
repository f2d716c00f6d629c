//! Types of kernels: of synthetic ones, of the running one, and of Debian's kernels if present.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use libkerf::btf::{BtfError, Disagreement, Host, RUNNING, Types, agree};
use proptest::prelude::*;

/// Builds types, which are numbered in the order of the calls, from 1.
#[derive(Clone, Default)]
struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Builder {
    fn new() -> Self {
        Self {
            strings: vec![0],
            ..Self::default()
        }
    }

    fn string(&mut self, text: &str) -> u32 {
        let at = u32::try_from(self.strings.len()).unwrap();
        self.strings.extend(text.as_bytes());
        self.strings.push(0);
        at
    }

    fn add(
        &mut self,
        name: &str,
        kind: u32,
        length: usize,
        size_or_type: u32,
        rest: &[u32],
    ) -> u32 {
        let name = match name {
            "" => 0,
            name => self.string(name),
        };
        let info = kind << 24 | u32::try_from(length).unwrap();
        for word in [name, info, size_or_type].iter().chain(rest) {
            self.types.extend(word.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    fn integer(&mut self, name: &str, bytes: u32) -> u32 {
        self.add(name, 1, 0, bytes, &[bytes * 8])
    }

    fn structure(&mut self, name: &str, bytes: u32, members: &[(&str, u32, u32)]) -> u32 {
        let mut rest = Vec::new();
        for (name, number, bit) in members {
            let name = self.string(name);
            rest.extend([name, *number, *bit]);
        }
        self.add(name, 4, members.len(), bytes, &rest)
    }

    fn array(&mut self, of: u32, count: u32) -> u32 {
        self.add("", 3, 0, 0, &[of, of, count])
    }

    fn bytes(&self) -> Vec<u8> {
        let (types, strings) = (self.types.len(), self.strings.len());
        let words = [24, 0, types, types, strings].map(|word| u32::try_from(word).unwrap());
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in words {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.types);
        bytes.extend(&self.strings);
        bytes
    }
}

/// Returns the types of a kernel whose ring messages have room for this number of bytes and, optionally, a sender
/// field.
fn kernel(message_bytes: u32, sender: bool) -> Vec<u8> {
    let mut types = Builder::new();
    let (byte, word, long) = (
        types.integer("char", 1),
        types.integer("u32", 4),
        types.integer("u64", 8),
    );
    let alias = types.add("phys", 8, 0, long, &[]);
    let buffer = types.array(byte, message_bytes);
    let mut members = vec![
        ("sender_cpu", alias, 0),
        ("type", word, 64),
        ("buffer", buffer, 128),
    ];
    if sender {
        members.insert(2, ("sender", word, 96));
    }
    let data = types.structure("mk_ipi_data", 16 + message_bytes, &members);
    let entries = types.array(data, 64);
    let ring = types.structure(
        "mk_ipi_ring",
        8 + 64 * (16 + message_bytes),
        &[
            ("head", word, 0),
            ("tail", word, 32),
            ("entries", entries, 64),
        ],
    );
    let size = 16 + 64 * (16 + message_bytes);
    types.structure(
        "mk_shared_data",
        size,
        &[("ring", ring, 0), ("force_halt", word, (size - 8) * 8)],
    );
    types.bytes()
}

/// Returns an uncompressed kernel with these types.
fn vmlinux(types: &[u8]) -> Vec<u8> {
    let names = b"\0.BTF\0.shstrtab\0";
    let (start, after) = (64, 64 + types.len());
    let table = after + names.len();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[40..48].copy_from_slice(&(table as u64).to_le_bytes());
    file[58..60].copy_from_slice(&64_u16.to_le_bytes());
    file[60..62].copy_from_slice(&3_u16.to_le_bytes());
    file[62..64].copy_from_slice(&2_u16.to_le_bytes());
    file.extend(types);
    file.extend(names);
    let sections = [
        (0_u32, 0, 0),
        (1, start, types.len()),
        (6, after, names.len()),
    ];
    for (name, at, bytes) in sections {
        let mut header = vec![0_u8; 64];
        header[0..4].copy_from_slice(&name.to_le_bytes());
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(bytes as u64).to_le_bytes());
        file.extend(header);
    }
    file
}

fn host(types: &[u8]) -> Host<'_> {
    Host {
        release: "7.0.0-mk2",
        version: "#1 SMP Mon Nov 30",
        types: Some(types),
    }
}

#[test]
fn kernels_with_the_same_layout_agree() {
    let own = kernel(4096, false);
    agree(host(&own), &vmlinux(&own)).unwrap();
    // Names of types are not compared.
    let mut renamed = own.clone();
    let at = renamed.windows(4).position(|part| part == b"phys").unwrap();
    renamed[at] = b'P';
    agree(host(&own), &vmlinux(&renamed)).unwrap();
}

#[test]
fn what_differs_is_named_with_its_place_in_both() {
    let own = kernel(4096, false);
    let error = agree(host(&own), &vmlinux(&kernel(4096, true)))
        .unwrap_err()
        .to_string();
    let wanted = "in struct mk_shared_data the host's kernel has ring.entries[64].buffer[4096] (integer of 1 bytes) at \
                  byte 24, the image ring.entries[64].sender (integer of 4 bytes) at byte 20";
    assert!(error.starts_with(wanted), "{error}");
    // The first generation had messages of 256 bytes.
    let error = agree(host(&own), &vmlinux(&kernel(256, false))).unwrap_err();
    let Disagreement::Differs(differences) = error else {
        panic!("{error}")
    };
    let names: Vec<_> = differences
        .iter()
        .map(|difference| difference.structure)
        .collect();
    assert_eq!(names, ["mk_shared_data", "mk_ipi_ring", "mk_ipi_data"]);
}

#[test]
fn who_does_not_say_is_named() {
    let (own, mut plain) = (kernel(4096, false), Builder::new());
    plain.integer("int", 4);
    let plain = plain.bytes();
    let said = |host: Host<'_>, image: &[u8]| agree(host, image).unwrap_err().to_string();
    let shows_none = Host {
        types: None,
        ..host(&own)
    };
    let image = vmlinux(&own);
    assert!(said(shows_none, &image).contains("the host's kernel does not describe"));
    assert!(said(host(&plain), &image).contains("CONFIG_MULTIKERNEL"));
    assert!(said(host(&own), &vmlinux(&plain)).contains("the image does not describe"));
    let mut stripped = image.clone();
    let at = stripped
        .windows(5)
        .position(|part| part == b".BTF\0")
        .unwrap();
    stripped[at] = b'_';
    assert!(said(host(&own), &stripped).contains("CONFIG_DEBUG_INFO_BTF"));
    assert!(said(host(&own), b"no kernel").contains("not a 64-bit ELF"));
}

#[test]
fn the_running_build_needs_no_types() {
    // A bzImage with nothing but its header.
    let image = libkerf::image::synthetic("7.0.0-mk2 (maker@host) #1 SMP Mon Nov 30", b"");
    let mut own = Host {
        types: None,
        ..host(&[])
    };
    agree(own, &image).unwrap();
    own.version = "#2 SMP Mon Nov 30";
    assert!(agree(own, &image).is_err());
    own.version = "";
    assert!(agree(own, &image).is_err());
}

#[test]
fn circles_and_cuts_are_no_layout() {
    let mut types = Builder::new();
    // A cycle: each of the two types is a typedef of the other.
    types.add("a", 8, 0, 2, &[]);
    types.add("b", 8, 0, 1, &[]);
    types.structure("mk_shared_data", 8, &[("x", 1, 0)]);
    let types = types.bytes();
    assert_eq!(Types::read(&types).unwrap().layout("mk_shared_data"), None);
    let own = kernel(4096, false);
    for cut in 0..own.len() {
        // A cut at the end removes names; a type without its own bytes is always an error.
        assert!(Types::read(&own[..cut]).is_err(), "{cut}");
    }
    let mut later = own.clone();
    later[2] = 9;
    assert_eq!(Types::read(&later).unwrap_err(), BtfError::Version(9));
}

proptest! {
    /// Reading any file stays within the bounds of the file.
    #[test]
    fn damage_does_no_harm(at in 0_usize..2000, byte: u8) {
        let mut own = kernel(256, true);
        let length = own.len();
        own[at % length] = byte;
        let image = vmlinux(&own);
        let _ = agree(host(&kernel(256, true)), &image);
        let _ = agree(host(&own), &image[..image.len() - at % image.len()]);
    }
}

#[test]
fn the_running_kernels_types_are_read() {
    let Ok(bytes) = std::fs::read(RUNNING) else {
        eprintln!("not tested: the running kernel shows no types");
        return;
    };
    let layout = Types::read(&bytes).unwrap().layout("list_head").unwrap();
    let said: Vec<_> = layout.iter().map(ToString::to_string).collect();
    let wanted = [
        "next (pointer) at byte 0",
        "prev (pointer) at byte 8",
        "its end at byte 16",
    ];
    assert_eq!(said, wanted);
}

/// Debian's kernels, if scripts/fetch-kernels has fetched them.
#[test]
fn types_of_real_images_are_read() {
    let cache =
        std::env::var("KMORPH_CACHE_DIR").unwrap_or_else(|_| "/var/cache/kmorph".to_owned());
    // Other kernels may be present, for example one that a debug target has built without BTF.
    let releases = ["6.1", "6.12", "7.3"]
        .map(|series| std::fs::read_to_string(format!("{cache}/kernels/{series}")));
    for release in releases.into_iter().flatten() {
        let path = format!("{cache}/kernels/{}/vmlinuz", release.trim());
        let image = std::fs::read(&path).unwrap();
        let kernel = libkerf::image::unpack(&image).unwrap();
        let types = Types::of_kernel(&kernel).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let layout = types.layout("boot_params").unwrap();
        let end = layout.last().unwrap();
        assert_eq!(end.bit, 4096 * 8, "{path:?}: {end}");
        assert!(types.layout("task_struct").is_some(), "{path:?}");
    }
}
