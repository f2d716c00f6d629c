//! Completions and man pages, generated from the command line definition, so that they are always up to date.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;

pub(super) fn completions(out: &mut Output, shell: Shell) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kmorphctl", &mut script);
    out.bytes(&script)?;
    Ok(Exit::Ok)
}

pub(super) fn man(out: &mut Output, dir: &Path) -> Result<Exit, Failure> {
    std::fs::create_dir_all(dir)
        .map_err(|error| Failure::file("make the directory", dir, &error))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|error| Failure::file("write man pages to", dir, &error))?;
    out.hint(&format!("Man pages are in {}", dir.display()))?;
    Ok(Exit::Ok)
}
