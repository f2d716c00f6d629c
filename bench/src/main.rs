//! Measures kmorph and prints a table; exits with 1 when a bar is not kept. Run the program in release mode, on a quiet
//! machine: `make bench`. `docs/benchmarks.md` explains each figure.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "what cannot be measured ends the run, as it ends a test"
)]

mod capture;
mod figure;
mod growth;
mod instances;
mod lifecycle;
mod machine;
mod morph;
mod process;
mod python;
mod qemu;
mod recoveries;
mod report;
mod ring;
mod scale;
mod survivor;
mod survivors;
mod trees;
mod vmcore;
mod vsock;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use figure::Figure;
use machine::Machine;
use report::Report;

/// Measures kmorph, prints a table, and ends with 1 when a bar is not kept.
#[derive(Debug, Parser)]
struct Options {
    /// Measure only this group; may be given more than once.
    #[arg(long, value_enum)]
    only: Vec<Group>,
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    json: PathBuf,
    /// Print the section of docs/benchmarks.md instead of the table.
    #[arg(long)]
    markdown: bool,
    /// Write that section into this document, in place of the one that is there.
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
    /// Morphs for each size of the state.
    #[arg(long, value_name = "N", default_value_t = 100)]
    morphs: usize,
    /// Size of the values that `morph` moves, in MiB; may be given more than once.
    #[arg(long, value_name = "MIB", default_values_t = [64, 1024])]
    morph_mib: Vec<usize>,
    /// Instances of the group `scale`.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    instances: usize,
    /// Seconds that `scale` watches with nothing else to do.
    #[arg(long, value_name = "S", default_value_t = 60)]
    quiet_seconds: u64,
    /// Seconds that `scale` watches with every core loaded.
    #[arg(long, value_name = "S", default_value_t = 600)]
    loaded_seconds: u64,
    /// Instances of `recoveries`, those of them that are killed, and the seconds in which all are to run again; may be
    /// given more than once.
    #[arg(long, value_name = "N:KILLED:S", default_values = ["300:50:3", "2000:500:20"], value_parser = recoveries)]
    recoveries: Vec<recoveries::Plan>,
    /// Memory of the instance that `capture` captures, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    capture_mib: u64,
    /// Morphs of `growth`.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    growth_morphs: usize,
}

fn recoveries(text: &str) -> Result<recoveries::Plan, String> {
    let numbers: Result<Vec<usize>, _> = text.split(':').map(str::parse).collect();
    match numbers.as_deref() {
        Ok([instances, killed, seconds]) if (1..=*instances).contains(killed) => {
            Ok(recoveries::Plan {
                instances: *instances,
                killed: *killed,
                bar: Duration::from_secs(*seconds as u64),
            })
        }
        _ => Err("write it like 300:50:3: instances, those killed, seconds".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    Wire,
    Trees,
    Lifecycle,
    Morph,
    Scale,
    Recoveries,
    Growth,
    Ring,
    Vsock,
    Qemu,
    Vmcore,
    Capture,
    Survivors,
}

/// The results of a group.
#[derive(Debug, Default)]
struct Found {
    figures: Vec<Figure>,
    remarks: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut report = Report {
        machine: Machine::read(),
        figures: Vec::new(),
        remarks: Vec::new(),
    };
    for group in Group::value_variants() {
        if options.only.is_empty() || options.only.contains(group) {
            eprintln!("measuring {group:?} …");
            let found = measure(*group, &options);
            report.figures.extend(found.figures);
            report.remarks.extend(found.remarks);
        }
    }
    if options.markdown {
        print!("{}", report.markdown());
    } else {
        println!("{}\n\n{}", report.machine, report.table());
        for remark in &report.remarks {
            println!("{remark}");
        }
    }
    if let Err(error) = write(&report, &options) {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    ExitCode::from(u8::from(report.failed()))
}

fn measure(group: Group, options: &Options) -> Found {
    match group {
        Group::Wire => wire::run(),
        Group::Trees => trees::run(),
        Group::Lifecycle => lifecycle::run(),
        Group::Morph => morph::run(options.morphs, &options.morph_mib),
        Group::Scale => scale::run(&scale::Plan {
            instances: options.instances,
            quiet: Duration::from_secs(options.quiet_seconds),
            loaded: Duration::from_secs(options.loaded_seconds),
        }),
        Group::Recoveries => many_recoveries(options),
        Group::Growth => growth::run(options.growth_morphs),
        Group::Ring => ring::run(),
        Group::Vsock => vsock::run(),
        Group::Qemu => qemu::run(),
        Group::Vmcore => vmcore::run(),
        Group::Capture => capture::run(options.capture_mib),
        Group::Survivors => survivors::run(),
    }
}

fn many_recoveries(options: &Options) -> Found {
    let mut all = Found::default();
    for plan in &options.recoveries {
        let found = recoveries::run(plan);
        all.figures.extend(found.figures);
        all.remarks.extend(found.remarks);
    }
    all
}

fn write(report: &Report, options: &Options) -> Result<(), String> {
    let json = serde_json::to_string_pretty(report).map_err(|e| e.to_string())?;
    let path = &options.json;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| format!("making {parent:?}: {e}"))?;
    }
    std::fs::write(path, json + "\n").map_err(|e| format!("writing {path:?}: {e}"))?;
    match &options.document {
        Some(path) => report
            .write_into(path)
            .map_err(|e| format!("writing {path:?}: {e}")),
        None => Ok(()),
    }
}
