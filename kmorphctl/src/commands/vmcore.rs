//! `kmorphctl vmcore analyze`: prints the analysis of a vmcore, without the daemon.

use std::fmt::Write as _;
use std::path::Path;

use kmorph_vmcore::analysis::events::{Event, EventKind};
use kmorph_vmcore::analysis::tasks::{self, Task, TasksError};
use kmorph_vmcore::analysis::{
    self, AnalysisOptions, CpuReport, FileReport, LogReport, MemoryReport, Report,
};
use kmorph_vmcore::kernel::Kernel;
use kmorph_vmcore::{Dump, DumpError};

use crate::cli::AnalyzeArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::bytes as size;
use crate::output::{LastColumn, Output, Tone, Word};

/// Number of lines shown from the end of the log.
const LOG_LINES: usize = 20;
/// Maximum number of calls shown per event.
const CALLS: usize = 16;
/// Maximum number of addresses shown from one CPU's stack.
const STACK: usize = 8;

/// Analyses a file.
pub(super) fn analyze(out: &mut Output, args: &AnalyzeArgs) -> Result<Exit, Failure> {
    let path = &args.file;
    let dump = Dump::open(path)
        .map_err(|error| Failure::file("read", path, &error))?
        .map_err(|error| refused(path, &error))?;
    if args.log {
        return log(out, path, &dump);
    }
    if let Some(vmlinux) = &args.vmlinux {
        // drgn would block on a FIFO.
        kmorph_files::open_named(vmlinux, u64::MAX)
            .map_err(|error| Failure::invalid(error.to_string()))?;
    }
    let options = AnalysisOptions { scan: args.scan };
    let report = analysis::analyse(&dump, options).map_err(|error| refused(path, &error))?;
    let kernel = report.kernel.as_ref();
    let build_id = kernel.and_then(|kernel| kernel.build_id.as_deref());
    let tasks = args
        .vmlinux
        .as_deref()
        .map(|vmlinux| tasks::tasks(path, vmlinux, build_id));
    if out.is_json() {
        json(out, &report, &tasks)?;
    } else {
        show(out, path, &report)?;
        if let Some(Ok(tasks)) = &tasks {
            show_tasks(out, tasks)?;
        }
    }
    match (verdict(path, &report.file), tasks) {
        (Ok(_), Some(Err(error))) => Err(no_tasks(&error)),
        (verdict, _) => verdict,
    }
}

/// The exit code also reports a damaged file, after everything that could be determined was printed.
fn verdict(path: &Path, file: &FileReport) -> Result<Exit, Failure> {
    let path = path.display();
    match (file.checksum, file.incomplete_because) {
        ("broken" | "wrong_length", _) => Err(Failure::invalid(format!(
            "{path} is damaged: its contents differ from what was written"
        ))),
        (_, Some(why)) => Err(Failure::invalid(format!("{path} is incomplete: {why}"))),
        _ => Ok(Exit::Ok),
    }
}

fn refused(path: &Path, error: &DumpError) -> Failure {
    Failure::invalid(format!("cannot analyze {}: {error}", path.display()))
}

fn no_tasks(error: &TasksError) -> Failure {
    let exit = match error {
        TasksError::NoDrgn => Exit::Resources,
        TasksError::OtherBuild { .. } | TasksError::Image { .. } => Exit::InvalidInput,
        _ => Exit::OperationFailed,
    };
    Failure::new(exit, error.to_string())
}

fn log(out: &mut Output, path: &Path, dump: &Dump) -> Result<Exit, Failure> {
    let log = Kernel::in_dump(dump)
        .and_then(|kernel| kernel.log())
        .map_err(|error| {
            let text = format!("cannot read the log in {}: {error}", path.display());
            Failure::invalid(text)
        })?;
    if out.is_json() {
        // The same form as in the complete report.
        out.json(&serde_json::json!({ "log": LogReport::of(&log) }))?;
    } else {
        out.bytes(&log.text())?;
    }
    let file = FileReport::of(dump).map_err(|error| refused(path, &error))?;
    verdict(path, &file)
}

fn json(
    out: &mut Output,
    report: &Report,
    tasks: &Option<Result<Vec<Task>, TasksError>>,
) -> Result<(), Failure> {
    let encode = |error| Failure::internal(format!("cannot encode the report: {error}"));
    let mut value = serde_json::to_value(report).map_err(encode)?;
    if let Some(Ok(tasks)) = tasks {
        value["tasks"] = serde_json::to_value(tasks).map_err(encode)?;
    }
    out.json(&value)
}

fn show(out: &mut Output, path: &Path, report: &Report) -> Result<(), Failure> {
    let mut fields: Vec<(&str, Word)> = vec![("File", path.display().to_string().into())];
    fields.extend(file_fields(&report.file));
    fields.extend(kernel_fields(report));
    fields.extend(crash_fields(report));
    out.fields(&fields)?;
    for event in &report.crash.events {
        show_event(out, event)?;
    }
    for cpu in &report.cpus {
        show_cpu(out, cpu)?;
    }
    show_memory(out, &report.memory)?;
    if let Some(log) = &report.log {
        let lines: Vec<_> = log.text.lines().collect();
        let from = lines.len().saturating_sub(LOG_LINES);
        out.line(&format!(
            "\nLog: {} messages, the end of it (--log prints all)",
            log.messages
        ))?;
        for line in &lines[from..] {
            out.line(&format!("  {line}"))?;
        }
    }
    if !report.problems.is_empty() {
        out.line("\nNot determined:")?;
        for problem in &report.problems {
            out.line(&format!("  {problem}"))?;
        }
    }
    Ok(())
}

fn file_fields(file: &FileReport) -> Vec<(&'static str, Word)> {
    let mut format = format!("{}, {}", file.format, size(file.bytes));
    if !file.packings.is_empty() {
        let _ = write!(format, ", packed with {}", file.packings.join(" and "));
    }
    let complete = match file.incomplete_because {
        None => Word::toned("yes", Tone::Good),
        Some(why) => Word::toned(format!("no: {why}"), Tone::Bad),
    };
    let checksum = match file.checksum {
        "holds" => Word::toned("holds", Tone::Good),
        "none" => "none".into(),
        "wrong_length" => Word::toned("the file length differs from the one it records", Tone::Bad),
        other => Word::toned(other, Tone::Bad),
    };
    let level = match file.level {
        Some(level) => format!("{level} ({})", level_names(level)),
        None => "the file does not say".to_owned(),
    };
    vec![
        ("Format", format.into()),
        ("Complete", complete),
        ("Checksum", checksum),
        ("Left out", level.into()),
    ]
}

fn level_names(level: u32) -> String {
    let kinds = [
        (1, "zero"),
        (2, "cache"),
        (4, "private cache"),
        (8, "user"),
        (16, "free"),
    ];
    let names = kinds.iter().filter(|(bit, _)| level & bit != 0);
    let names: Vec<_> = names.map(|(_, name)| *name).collect();
    match names.is_empty() {
        true => "nothing".to_owned(),
        false => names.join(", "),
    }
}

fn kernel_fields(report: &Report) -> Vec<(&'static str, Word)> {
    let Some(kernel) = &report.kernel else {
        return vec![("Kernel", Word::toned("not described", Tone::Warning))];
    };
    let mut fields: Vec<(&str, Word)> = Vec::new();
    let texts = [
        ("Kernel", &kernel.release),
        ("Version", &kernel.version),
        ("Machine", &kernel.machine),
        ("Build id", &kernel.build_id),
        ("Command line", &kernel.command_line),
    ];
    for (name, text) in texts {
        fields.extend(text.clone().map(|text| (name, text.into())));
    }
    fields.push(("VMCOREINFO", format!("from {}", kernel.vmcoreinfo).into()));
    if let Some(taint) = &kernel.taint {
        let text = match taint.letters.as_str() {
            "" => "none".to_owned(),
            letters => format!("{letters}: {}", taint.meanings.join("; ")),
        };
        fields.push(("Taint", format!("{text} (from {})", taint.source).into()));
    }
    if let Some(modules) = &report.modules {
        let names = match modules.names.is_empty() {
            true => "none".to_owned(),
            false => modules.names.join(" "),
        };
        fields.push((
            "Modules",
            format!("{names} (from {})", modules.source).into(),
        ));
    }
    fields
}

fn crash_fields(report: &Report) -> Vec<(&'static str, Word)> {
    let crash = &report.crash;
    let mut fields: Vec<(&str, Word)> = Vec::new();
    if let Some(nanos) = crash.uptime_at_least_ns {
        let text = format!("at least {}: the time of the last message", seconds(nanos));
        fields.push(("Uptime", text.into()));
    }
    fields.push(match &crash.panic {
        Some(panic) => ("Panic", Word::toned(panic, Tone::Bad)),
        None if report.log.is_some() => {
            let text = "none in the log: the kernel hung, was stopped from outside, or was alive";
            ("Panic", text.into())
        }
        None => ("Panic", "unknown without the log".into()),
    });
    fields.extend(
        crash
            .cause
            .as_ref()
            .map(|cause| ("Cause", Word::toned(cause, Tone::Bad))),
    );
    fields
}

fn show_event(out: &mut Output, event: &Event) -> Result<(), Failure> {
    let tone = match event.kind {
        EventKind::Warning => Tone::Warning,
        _ => Tone::Bad,
    };
    let title = out.paint(&Word::toned(&event.title, tone));
    out.raw(&format!("\nAt {}: {title}", seconds(event.time_ns)))?;
    for line in [&event.who, &event.hardware].into_iter().flatten() {
        out.line(&format!("  {line}"))?;
    }
    if let Some(rip) = &event.rip {
        out.line(&format!("  RIP: {rip}"))?;
    }
    for registers in event.registers.chunks(3) {
        let words: Vec<_> = registers
            .iter()
            .map(|(n, v)| format!("{n:>8} {v:<16}"))
            .collect();
        out.line(&format!("  {}", words.join(" ")))?;
    }
    if let Some(code) = &event.code {
        out.line(&format!("  Code: {code}"))?;
    }
    let calls = event
        .call_trace
        .iter()
        .filter(|call| !call.starts_with(['?', '<']));
    let mut calls = calls.peekable();
    if calls.peek().is_some() {
        out.line("  Call trace (unreliable entries omitted):")?;
    }
    for call in calls.take(CALLS) {
        out.line(&format!("    {call}"))?;
    }
    Ok(())
}

fn show_cpu(out: &mut Output, cpu: &CpuReport) -> Result<(), Failure> {
    let at = cpu.at.as_deref().unwrap_or("an address without a symbol");
    let idle = if cpu.idle { ", idle" } else { "" };
    let number = cpu.index;
    out.line(&format!(
        "\nCPU {number}: in {} mode{idle}, at {at}",
        cpu.mode
    ))?;
    for registers in cpu.registers.chunks(3) {
        let words: Vec<_> = registers
            .iter()
            .map(|(n, v)| format!("{n:>8} {v}"))
            .collect();
        out.line(&format!("  {}", words.join(" ")))?;
    }
    if !cpu.stack.is_empty() && !cpu.idle {
        out.line("  Code addresses on its stack (a guess: not all of them were called):")?;
        for place in cpu.stack.iter().take(STACK) {
            out.line(&format!("    {place}"))?;
        }
    }
    Ok(())
}

fn show_memory(out: &mut Output, memory: &MemoryReport) -> Result<(), Failure> {
    out.line(&format!(
        "\nMemory: {}, {} pages",
        size(memory.bytes),
        memory.pages
    ))?;
    let kinds = memory.kinds.unwrap_or_default();
    let known = memory.left_out.is_some();
    let left_out = memory.left_out.unwrap_or_default();
    let rows = [
        ("kernel", kinds.kernel, left_out.kernel),
        ("slab", kinds.slab, left_out.slab),
        ("user", kinds.user, left_out.user),
        ("cache", kinds.cache, left_out.cache),
        ("private cache", kinds.cache_private, left_out.cache_private),
        ("free", kinds.free, left_out.free),
        ("broken or offline", kinds.unusable, left_out.unusable),
        ("unknown", kinds.unknown, left_out.unknown),
    ];
    let row = |(name, pages, left_out): (&str, u64, u64)| -> Vec<Word> {
        let bytes = size(pages.saturating_mul(4096));
        vec![
            name.into(),
            pages.to_string().into(),
            bytes.into(),
            match known {
                true => left_out.to_string().into(),
                false => "unknown".into(),
            },
        ]
    };
    if memory.kinds.is_some() {
        let header = ["KIND", "PAGES", "SIZE", "LEFT OUT"];
        out.table(&header, rows.map(row).into(), LastColumn::Words, "")?;
    }
    let counts = [
        ("Pages of zeros", memory.zero),
        ("Pages in the file", memory.pages_in_file),
        ("Pages that cannot be read", memory.unreadable),
    ];
    let counts = counts
        .iter()
        .filter_map(|(name, count)| Some((*name, (*count)?)));
    let fields: Vec<_> = counts
        .map(|(name, n)| (name, n.to_string().into()))
        .collect();
    out.fields(&fields)
}

fn show_tasks(out: &mut Output, tasks: &[Task]) -> Result<(), Failure> {
    out.line(&format!("\nTasks: {}", tasks.len()))?;
    for task in tasks {
        out.line(&format!(
            "\n{} {}: state {}, CPU {}",
            task.pid, task.comm, task.state, task.cpu
        ))?;
        for frame in &task.stack {
            out.line(&format!("  {frame}"))?;
        }
    }
    Ok(())
}

fn seconds(nanos: u64) -> String {
    format!(
        "{}.{:06} s",
        nanos / 1_000_000_000,
        nanos / 1000 % 1_000_000
    )
}
