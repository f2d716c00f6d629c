//! Writes a dump anew: in another format, without the pages that a level leaves out, or from a guest's
//! memory file. For trying the writer by hand; kmorphd captures with the library.
//!
//! ```text
//! convert [--memory] [--format elf|none|zlib|lzo|zstd] [--level 0..31] [--threads N] <input> <output>
//! ```
//!
//! With `--memory` the input is a memory file of QEMU's q35 with `max-ram-below-4g=2G`.

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Instant, SystemTime};

use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::kernel::Kernel;
use kmorph_vmcore::writer::{self, Contents, Control, Options, Output};
use kmorph_vmcore::{Dump, MemoryFile, PhysicalMemory};

/// Where QEMU's q35 puts the rest of the memory above 4 GiB, when told so.
const LOW_MEMORY_BYTES: u64 = 2 << 30;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut memory = false;
    let mut options = Options {
        output: Output::Kdump(Compression::Zstd),
        level: 31,
        threads: std::thread::available_parallelism()?.get(),
        time: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?,
    };
    let mut paths = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} takes a value"));
        match word.as_str() {
            "--memory" => memory = true,
            "--format" => options.output = format(&value()?)?,
            "--level" => options.level = value()?.parse()?,
            "--threads" => options.threads = value()?.parse()?,
            _ => paths.push(PathBuf::from(word)),
        }
    }
    let [input, output] = paths.as_slice() else {
        return Err("one input and one output are needed".into());
    };
    let started = Instant::now();
    let file;
    let dump;
    let (source, kernel, cpus, level_of_source): (&dyn PhysicalMemory, _, Vec<_>, _) = if memory {
        file = MemoryFile::of_pc(File::open(input)?, LOW_MEMORY_BYTES)?;
        (&file, Kernel::in_memory(&file), Vec::new(), 0)
    } else {
        dump = Dump::open(input)??;
        let cpus = dump.notes().cpus.iter().map(|cpu| cpu.status).collect();
        (
            &dump,
            Kernel::in_dump(&dump),
            cpus,
            dump.level().unwrap_or(0),
        )
    };
    if let Err(error) = &kernel {
        eprintln!("warning: {error}");
    }
    let contents = Contents {
        memory: source,
        kernel: kernel.as_ref().ok(),
        cpus: &cpus,
        level_of_source,
    };
    let written = writer::write(contents, options, &Control::default(), output)?;
    println!("{written:?} in {:?}", started.elapsed());
    Ok(())
}

fn format(name: &str) -> Result<Output, String> {
    Ok(match name {
        "elf" => Output::Elf,
        "none" => Output::Kdump(Compression::None),
        "zlib" => Output::Kdump(Compression::Zlib),
        "lzo" => Output::Kdump(Compression::Lzo),
        "zstd" => Output::Kdump(Compression::Zstd),
        other => return Err(format!("there is no format {other}")),
    })
}
