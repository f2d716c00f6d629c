//! Records of loaded kernels: those of kerf and of libkerf are identical.

use std::path::{Path, PathBuf};
use std::process::Command;

use libkerf::kernel::{Files, LoadError};
use libkerf::overlay::Status;
use libkerf::record::{Image, Initrd, Record, Records};
use serde_json::Value;

use crate::boot::Spawns;
use crate::{create, ground, kerf};

/// Runs kerf's own code, with its records in `directory`, and returns its output.
fn python(directory: &Path, code: &str) -> String {
    let setup =
        "import json, sys; from kerf import metadata; metadata.KERF_INSTANCES_DIR = sys.argv[1]; ";
    let output = Command::new(kerf::home().join("bin/python"))
        .args(["-B", "-c", &format!("{setup}{code}")])
        .arg(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn each_reads_the_records_of_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let records = Records::in_directory(directory.path());
    let image = Image {
        path: "/boot/vmlinuz".to_owned(),
        size: 3,
        sha256: "ab".repeat(32),
        format: Some("bzImage".to_owned()),
        compression: Some("zstd".to_owned()),
        version: Some("6.12.9".to_owned()),
    };
    let record = Record {
        kernel: Some(image.clone()),
        loaded_at: Some("2026-01-02T03:04:05+00:00".to_owned()),
        ..Record::default()
    };
    records.save("web", &record).unwrap();
    let read = python(
        directory.path(),
        "print(metadata.load_instance_metadata('web')['kernel']['version'])",
    );
    assert_eq!(read.trim(), "6.12.9");
    python(
        directory.path(),
        "path = sys.argv[1] + '/image'; open(path, 'wb').write(b'070701'); \
         metadata.save_instance_metadata('db', {'kernel': metadata.inspect_kernel_image(path), \
         'initrd': metadata.inspect_initrd_image(path), 'rootfs': None, 'loaded_at': 'now'})",
    );
    let db = records.load("db").unwrap().unwrap();
    assert_eq!(db.kernel.unwrap().format.as_deref(), Some("unknown"));
    match db.initrd {
        Some(Initrd::Image(initrd)) => assert_eq!(initrd.compression.as_deref(), Some("cpio")),
        other => panic!("{other:?}"),
    }
    records.remove("web").unwrap();
    assert_eq!(
        python(
            directory.path(),
            "print(metadata.load_instance_metadata('web'))"
        )
        .trim(),
        "None"
    );
}

/// Returns Debian's kernels from the tests' setup.
fn kernels() -> Vec<PathBuf> {
    let cache = kerf::home();
    let cache = cache.ancestors().nth(2).unwrap().join("kernels");
    let entries = std::fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let kernels: Vec<PathBuf> = entries
        .map(|entry| entry.join("vmlinuz"))
        .filter(|image| image.is_file())
        .collect();
    assert!(
        !kernels.is_empty(),
        "scripts/fetch-kernels puts them into {}",
        cache.display()
    );
    kernels
}

#[test]
fn an_image_is_described_as_kerf_describes_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let mut images = kernels();
    images.push(file(
        "vmlinux",
        b"\x7fELF  Linux version 6.13.1 (a@b) #1 SMP\n\0 Linux version 1",
    ));
    images.push(file("other", b"070701"));
    images.push(file("compressed", b"\x28\xb5\x2f\xfd..."));
    images.push(file("empty", b""));
    for image in images {
        for (kind, own) in [
            ("kernel", Image::of_kernel(&image).unwrap()),
            ("initrd", Image::of_initrd(&image).unwrap()),
        ] {
            let code = format!("print(json.dumps(metadata.inspect_{kind}_image({image:?})))");
            let kerfs: Value = serde_json::from_str(&python(directory.path(), &code)).unwrap();
            let mut own = serde_json::to_value(own).unwrap();
            if kind == "kernel" && own.get("version").is_none() {
                // kerf writes null, and treats a missing field as null.
                own["version"] = Value::Null;
            }
            assert_eq!(own, kerfs, "{kind} {}", image.display());
        }
    }
}

#[test]
fn an_image_is_unpacked_as_kerf_unpacks_it() {
    for image in kernels() {
        let code = format!(
            "import hashlib; from kerf import vmlinuz; \
             print(hashlib.sha256(vmlinuz.extract_vmlinux(open({image:?}, 'rb').read())).hexdigest())"
        );
        let unpacked = tempfile::NamedTempFile::new().unwrap();
        let packed = std::fs::read(&image).unwrap();
        std::fs::write(unpacked.path(), libkerf::image::unpack(&packed).unwrap()).unwrap();
        let own = Image::of_kernel(unpacked.path()).unwrap();
        let kerfs = python(Path::new("/"), &code);
        assert_eq!(own.sha256, kerfs.trim(), "{}", image.display());
        // The unpacked kernel has the same version as its wrapper.
        let outside = Image::of_kernel(&image).unwrap().version.unwrap();
        let release = outside.split(' ').next().unwrap();
        assert!(own.version.unwrap().starts_with(release));
    }
}

#[test]
fn an_image_is_unpacked_however_it_is_packed() {
    // Packed like in the kernel's build, with the size appended. For some formats, only Python has the compressor.
    let code = "if True:
        import bz2, gzip, lzma, random, struct, subprocess, os
        from kerf import vmlinuz
        random.seed(1)
        words = [random.randbytes(9) for _ in range(99)]
        body = b''.join(random.choice(words) for _ in range(50_000))
        head = bytearray(120)
        head[:6] = b'\\x7fELF\\x02\\x01'
        struct.pack_into('<Q', head, 32, 64)
        struct.pack_into('<HH', head, 54, 56, 1)
        struct.pack_into('<QQQQ', head, 72, 120, 0, 0, len(body))
        kernel = bytes(head) + body
        packed = kernel + b'relocations'
        x86 = [{'id': lzma.FILTER_X86}, {'id': lzma.FILTER_LZMA2, 'dict_size': 1 << 25}]
        run = lambda *argv: subprocess.run(argv, input=packed, stdout=subprocess.PIPE, check=True).stdout
        payloads = {
            'gzip': gzip.compress(packed, 9),
            'bzip2': bz2.compress(packed),
            'xz': lzma.compress(packed, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=x86),
            'lzma': lzma.compress(packed, lzma.FORMAT_ALONE),
            'zstd': run('zstd', '-q', '-19', '-c'),
            'lz4': run('lz4', '-l', '-9', '-c'),
            'lz4-frame': run('lz4', '-9', '-c'),
        }
        open('kernel', 'wb').write(kernel)
        for name, payload in payloads.items():
            if name not in ('gzip', 'lz4-frame'):
                payload += struct.pack('<I', len(packed))
            image = bytearray(0x600)
            image[0x1f1] = 1
            image[0x202:0x206] = b'HdrS'
            struct.pack_into('<H', image, 0x206, 0x20f)
            struct.pack_into('<II', image, 0x248, 0x200, len(payload))
            image = bytes(image[:0x400 + 0x200]) + payload
            assert vmlinuz.extract_vmlinux(image) == kernel, name
            open('image-' + name, 'wb').write(image)
    ";
    let directory = tempfile::tempdir().unwrap();
    let code = format!("import os; os.chdir(sys.argv[1])\nexec({code:?})");
    python(directory.path(), &code);
    let kernel = std::fs::read(directory.path().join("kernel")).unwrap();
    let mut tried = 0;
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("image-") {
            tried += 1;
            let image = std::fs::read(&path).unwrap();
            let unpacked = libkerf::image::unpack(&image).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(unpacked == kernel, "{name}");
        }
    }
    assert_eq!(tried, 7);
}

#[test]
fn what_is_loaded_is_recorded_and_forgotten_when_it_is_unloaded() {
    let Some(ground) = ground() else { return };
    let kernel = &ground.kernel;
    kernel.apply(&create("web", &[8]), None).unwrap();
    let spawns = Spawns::new(&ground.emulator.mk);
    let directory = tempfile::tempdir().unwrap();
    let records = Records::in_directory(directory.path().join("instances"));
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, b"\x1f\x8b...").unwrap();
    let mut files = Files {
        kernel: kernels().remove(0),
        initrd: Some(initrd),
        cmdline: "console=mktty0".to_owned(),
    };
    let record = kernel.load_files(&spawns, "web", &files, &records).unwrap();
    assert_eq!(records.load("web").unwrap().as_ref(), Some(&record));
    assert_eq!(
        *spawns.loaded.lock().unwrap(),
        *b"\x7fELF",
        "it was unpacked"
    );
    let show = "print(json.dumps(metadata.load_instance_metadata('web')))";
    let kerfs: Value =
        serde_json::from_str(&python(&directory.path().join("instances"), show)).unwrap();
    let sum = Command::new("sha256sum")
        .arg(&files.kernel)
        .output()
        .unwrap()
        .stdout;
    assert_eq!(
        kerfs["kernel"]["sha256"].as_str().unwrap().as_bytes(),
        &sum[..64]
    );
    assert!(
        kerfs["kernel"]["version"]
            .as_str()
            .unwrap()
            .starts_with("6.")
    );
    assert_eq!(kerfs["initrd"]["compression"], "gzip");
    let at = "import datetime; print(datetime.datetime.fromisoformat(sys.argv[2]).utcoffset())";
    let at = at.replace(
        "sys.argv[2]",
        &format!("{:?}", kerfs["loaded_at"].as_str().unwrap()),
    );
    assert_eq!(python(directory.path(), &at).trim(), "0:00:00");

    kernel.unload_recorded(&spawns, "web", &records).unwrap();
    assert_eq!(kernel.status("web").unwrap(), Status::Ready);
    assert!(records.load("web").unwrap().is_none());
    // A kernel that is not loaded gets no record.
    files.kernel = directory.path().join("packed");
    std::fs::copy(&kernels()[0], &files.kernel).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&files.kernel)
        .unwrap();
    file.set_len(1 << 20).unwrap();
    let refused = kernel
        .load_files(&spawns, "web", &files, &records)
        .unwrap_err();
    assert!(matches!(&refused, LoadError::Packed { .. }), "{refused}");
    files.kernel = directory.path().join("missing");
    let refused = kernel
        .load_files(&spawns, "web", &files, &records)
        .unwrap_err();
    assert!(matches!(&refused, LoadError::File(_)), "{refused}");
    std::fs::write(&files.kernel, b"").unwrap();
    let refused = kernel
        .load_files(&spawns, "web", &files, &records)
        .unwrap_err();
    assert!(matches!(&refused, LoadError::Boot(_)), "{refused}");
    assert!(records.load("web").unwrap().is_none());
}
