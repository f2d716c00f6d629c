//! Dumps of a large guest that panicked: the resources of the writer, compared with QEMU's own dumps, cp and
//! makedumpfile. All files are in memory, so that the comparison excludes disks.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kmorph_tests::crashed_guest::{CrashedGuest, LOW_MEMORY_BYTES, Plan};
use kmorph_tests::kernels;
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::kernel::Kernel;
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output};
use kmorph_vmcore::{Dump, MemoryFile};

use crate::Found;
use crate::figure::{Bar, Figure, Of, Unit};
use crate::survivor;

const GROUP: &str = "vmcore";
/// Memory of the guest, and the part filled with text, MiB.
const MEMORY_MIB: u64 = 4096;
const FILES_MIB: u64 = 2048;
/// Number of measured dumps of each kind, after one dump without a measurement.
const ROUNDS: usize = 5;
/// Number of threads of the writer: the daemon's default.
const THREADS: usize = 1;
/// The daemon's default level, which excludes every kind of page that can be excluded.
const LEVEL: u32 = 31;

pub(crate) fn run() -> Found {
    if !kernels::cache().join("kernels/6.1").is_file() {
        let remark = "vmcore: not measured, there is no kernel 6.1: run scripts/setup-tests";
        let (figures, remarks) = (Vec::new(), vec![remark.to_owned()]);
        return Found { figures, remarks };
    }
    let mut found = dumps();
    let more = survivor::run();
    found.figures.extend(more.figures);
    found.remarks.extend(more.remarks);
    found
}

/// Seconds and bytes of each kind of dump, one value per round.
#[derive(Default)]
struct Series {
    seconds: Vec<f64>,
    bytes: Vec<f64>,
}

impl Series {
    fn add(&mut self, (took, bytes): (Duration, u64)) {
        self.seconds.push(took.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "a file's length, for a ratio")]
        self.bytes.push(bytes as f64);
    }

    fn times(&self, what: &str) -> Figure {
        let milliseconds = self.seconds.iter().map(|s| s * 1e3).collect();
        Figure::of(GROUP, what, Unit::Milliseconds, milliseconds)
    }

    fn size(&self, what: &str) -> Figure {
        let mebibytes = self.bytes.iter().map(|b| b / f64::from(1 << 20)).collect();
        Figure::of(GROUP, what, Unit::Mebibytes, mebibytes)
    }
}

/// Returns the figure of the ratio of `of` to `to`, round by round.
fn ratio(what: &str, of: &[f64], to: &[f64]) -> Figure {
    let ratios = of.iter().zip(to).map(|(of, to)| of / to).collect();
    Figure::of(GROUP, what, Unit::Ratio, ratios)
}

fn dumps() -> Found {
    let guest = CrashedGuest::new(&Plan {
        memory_mib: MEMORY_MIB,
        files_mib: FILES_MIB,
        ..Plan::small("6.1")
    });
    let [mut elf, mut kdump, mut copy] = [(); 3].map(|()| Series::default());
    let [mut whole, mut filtered, mut lzo, mut zlib] = [(); 4].map(|()| Series::default());
    let [mut their_lzo, mut their_zlib] = [(); 2].map(|()| Series::default());
    for round in 0..=ROUNDS {
        let measured = |series: &mut Series, value: (Duration, u64)| {
            if round > 0 {
                series.add(value);
            }
        };
        measured(&mut elf, by_qemu(&guest, "elf"));
        measured(&mut kdump, by_qemu(&guest, "kdump-zlib"));
        measured(&mut copy, by_cp(&guest));
        let default = Output::Kdump(Compression::Zstd);
        measured(&mut filtered, ours(&guest, "filtered", default, LEVEL));
        measured(
            &mut lzo,
            ours(&guest, "lzo", Output::Kdump(Compression::Lzo), LEVEL),
        );
        measured(
            &mut zlib,
            ours(&guest, "zlib", Output::Kdump(Compression::Zlib), LEVEL),
        );
        let path = guest.path("whole");
        measured(&mut whole, write(&guest, &path, Output::Elf, 0));
        measured(&mut their_lzo, by_makedumpfile(&guest, &path, "-l"));
        measured(&mut their_zlib, by_makedumpfile(&guest, &path, "-c"));
        std::fs::remove_file(path).expect("it was written");
    }
    let with_elf = |theirs: &Series| -> Vec<f64> {
        let pairs = elf.seconds.iter().zip(&theirs.seconds);
        pairs.map(|(elf, theirs)| elf + theirs).collect()
    };
    let figures = vec![
        filtered.times("a verified dump, as kmorphd writes it"),
        filtered.size("its size"),
        whole.times("a verified dump of all, ELF"),
        elf.times("QEMU's dump-guest-memory, elf"),
        kdump.times("QEMU's dump-guest-memory, kdump-zlib"),
        copy.times("cp of the memory file"),
        ratio(
            "kdump-zlib's time against ours",
            &kdump.seconds,
            &filtered.seconds,
        )
        .bar(Bar::at_least(Of::Min, 5.0)),
        ratio("elf's time against ours", &elf.seconds, &filtered.seconds)
            .bar(Bar::at_least(Of::Min, 2.0)),
        ratio(
            "all as ELF, against cp's time",
            &whole.seconds,
            &copy.seconds,
        )
        .bar(Bar::at_most(Of::Max, 1.5)),
        lzo.times("filtered, LZO"),
        their_lzo.times("makedumpfile -l -d 31 of our ELF dump"),
        ratio(
            "LZO, against makedumpfile's time",
            &lzo.seconds,
            &their_lzo.seconds,
        ),
        ratio(
            "LZO, against elf and makedumpfile",
            &lzo.seconds,
            &with_elf(&their_lzo),
        )
        .bar(Bar::at_most(Of::Max, 1.0)),
        ratio(
            "LZO, against makedumpfile's size",
            &lzo.bytes,
            &their_lzo.bytes,
        )
        .bar(Bar::at_most(Of::Max, 1.1)),
        zlib.times("filtered, zlib"),
        their_zlib.times("makedumpfile -c -d 31 of our ELF dump"),
        ratio(
            "zlib, against makedumpfile's time",
            &zlib.seconds,
            &their_zlib.seconds,
        ),
        ratio(
            "zlib, against elf and makedumpfile",
            &zlib.seconds,
            &with_elf(&their_zlib),
        )
        .bar(Bar::at_most(Of::Max, 1.0)),
        ratio(
            "zlib, against makedumpfile's size",
            &zlib.bytes,
            &their_zlib.bytes,
        )
        .bar(Bar::at_most(Of::Max, 1.1)),
    ];
    let remark = format!(
        "vmcore: Linux 6.1, {MEMORY_MIB} MiB, of which {FILES_MIB} MiB are text in files; {THREADS} thread; every file in \
         memory. makedumpfile is Debian 12's, which has no zstd"
    );
    Found {
        figures,
        remarks: vec![remark],
    }
}

fn by_qemu(guest: &CrashedGuest, format: &str) -> (Duration, u64) {
    let begin = Instant::now();
    let path = guest.dump(format);
    let took = begin.elapsed();
    (took, done(&path))
}

fn by_cp(guest: &CrashedGuest) -> (Duration, u64) {
    let path = guest.path("copy");
    run_program(Command::new("cp").arg(guest.memory()).arg(&path), &path)
}

fn by_makedumpfile(guest: &CrashedGuest, dump: &Path, packed: &str) -> (Duration, u64) {
    let path = guest.path("again");
    let mut makedumpfile = Command::new("makedumpfile");
    makedumpfile.args([packed, "-d", &LEVEL.to_string(), "--message-level", "0"]);
    run_program(makedumpfile.arg(dump).arg(&path), &path)
}

fn run_program(command: &mut Command, path: &Path) -> (Duration, u64) {
    let begin = Instant::now();
    let ran = command
        .output()
        .expect("it is installed: scripts/setup-tests");
    let took = begin.elapsed();
    assert!(ran.status.success(), "{command:?}: {ran:?}");
    (took, done(path))
}

fn ours(guest: &CrashedGuest, name: &str, output: Output, level: u32) -> (Duration, u64) {
    let path: PathBuf = guest.path(name);
    let measured = write(guest, &path, output, level);
    done(&path);
    measured
}

/// Writes the dump as kmorphd does: finds the kernel, writes, syncs, reads back.
fn write(guest: &CrashedGuest, path: &Path, output: Output, level: u32) -> (Duration, u64) {
    let begin = Instant::now();
    let file = File::open(guest.memory()).expect("the guest has a memory");
    let memory = MemoryFile::of_pc(file, LOW_MEMORY_BYTES).expect("it is laid out so");
    let kernel = Kernel::in_memory(&memory).expect("there is a kernel in it");
    let contents = Contents {
        memory: &memory,
        kernel: Some(&kernel),
        cpus: &[],
        level_of_source: 0,
    };
    let options = Options {
        output,
        level,
        threads: THREADS,
        time: Duration::ZERO,
    };
    let written = writer::write(contents, options, &Control::default(), path);
    let took = begin.elapsed();
    assert!(written.expect("it is written").not_filtered.is_none());
    assert!(matches!(Dump::open(path), Ok(Ok(_))), "{path:?}");
    (took, length(path))
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).expect("it was written").len()
}

/// Returns the length of a file, and removes the file.
fn done(path: &Path) -> u64 {
    let bytes = length(path);
    std::fs::remove_file(path).expect("it was written");
    bytes
}
