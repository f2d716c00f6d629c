//! `kmorphctl import-upstream-config`.

use std::io::Write;
use std::path::Path;

use kmorph_control_api::paths::CONFIG_MAX_BYTES;
use serde_json::{Value, json};

use super::input;
use crate::cli::ImportUpstreamArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::upstream::{self, Fate, Fault, Import};

/// Maximum number of listed faults of a file; the message states the number of further ones.
const FAULTS_SHOWN: usize = 20;

pub(super) fn run(out: &mut Output, args: &ImportUpstreamArgs) -> Result<Exit, Failure> {
    let kind = "configuration of upstream's kmorph";
    let (name, bytes) = input::read(&args.file, CONFIG_MAX_BYTES, kind)?;
    let said = upstream::read(&bytes).map_err(|faults| refused(&name, &faults))?;
    let import = Import::of(&said);
    let toml = import.toml(&name);
    if let Some(file) = &args.output {
        write_new(file, &toml)?;
    }
    if out.is_json() {
        out.json(&as_json(&import, args.output.as_deref(), &toml))?;
        return Ok(Exit::Ok);
    }
    match &args.output {
        None => out.bytes(toml.as_bytes())?,
        Some(file) => summary(out, &import, file)?,
    }
    Ok(Exit::Ok)
}

/// Returns all faults of the file, one line each.
fn refused(name: &str, faults: &[Fault]) -> Failure {
    let mut lines: Vec<_> = faults
        .iter()
        .take(FAULTS_SHOWN)
        .map(|fault| format!("{name}:{fault}"))
        .collect();
    let more = faults.len().saturating_sub(FAULTS_SHOWN);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    Failure::invalid(lines.join("\n"))
        .hint("nothing was written; correct or remove these lines and import the file again")
}

/// Creates a new file atomically.
fn write_new(file: &Path, text: &str) -> Result<(), Failure> {
    let failed = |error: &std::io::Error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            let text = format!("{} already exists", file.display());
            Failure::new(Exit::Refused, text).hint("choose another file with --output")
        }
        _ => Failure::file("write", file, error),
    };
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let write = || {
        let mut new = tempfile::Builder::new()
            .prefix(".kmorphd-conf-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .tempfile_in(directory)?;
        new.write_all(text.as_bytes())?;
        new.as_file().sync_all()?;
        new.persist_noclobber(file)?;
        std::fs::File::open(directory)?.sync_all()
    };
    write().map_err(|error: std::io::Error| failed(&error))
}

fn summary(out: &mut Output, import: &Import, file: &Path) -> Result<(), Failure> {
    out.line(&format!("Configuration written to {}", file.display()))?;
    for (heading, fates) in [
        ("Taken over:", &import.taken),
        ("Not taken over:", &import.not_taken),
    ] {
        if !fates.is_empty() {
            out.line(heading)?;
        }
        for fate in fates {
            out.line(&format!("  {fate}"))?;
        }
    }
    for (what, command) in [
        ("The pool:", &import.pool_command),
        ("The instance:", &import.spawn_command),
    ] {
        if let Some(words) = command {
            out.line(what)?;
            out.line(&format!("  {}", upstream::shell(words)))?;
        }
    }
    Ok(())
}

fn as_json(import: &Import, file: Option<&Path>, toml: &str) -> Value {
    let fates = |fates: &[Fate], text: &str| -> Vec<Value> {
        let one = |fate: &Fate| json!({ "line": fate.line, "key": fate.key, text: fate.text });
        fates.iter().map(one).collect()
    };
    json!({
        "file": file.map(Path::to_string_lossy),
        "toml": toml,
        "taken_over": fates(&import.taken, "into"),
        "not_taken_over": fates(&import.not_taken, "reason"),
        "pool_command": import.pool_command,
        "spawn_command": import.spawn_command,
    })
}
