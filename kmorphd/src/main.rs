//! kmorphd: configuration, signals, sockets, wiring. Nothing else: the work is done by the actors.

mod config;
mod logging;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kmorph_control_api::paths::DefaultPaths;

use config::{File, Places};

/// Watches, heals and morphs kernel instances.
#[derive(Debug, Parser)]
#[command(name = "kmorphd", version)]
struct Arguments {
    /// Configuration file [default: /etc/kmorph/kmorphd.conf for root, else
    /// $XDG_CONFIG_HOME/kmorph/kmorphd.conf; none is needed].
    #[arg(long)]
    config: Option<PathBuf>,
    /// State directory, over the configuration's.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// Runtime directory, over the configuration's.
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Control socket, over the configuration's.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Read and check the configuration, then exit.
    #[arg(long)]
    check: bool,
}

/// Everything that is decided before the first actor starts.
struct Start {
    file: File,
    places: Places,
    socket: PathBuf,
    agent: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let check = arguments.check;
    let result = prepare(&arguments).and_then(|start| {
        let settings = start.file.settings(start.places.clone())?;
        if check {
            println!("the configuration is sound");
            return Ok(());
        }
        run::run(start, settings)
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kmorphd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(arguments: &Arguments) -> Result<Start, Box<dyn std::error::Error>> {
    let uid = nix::unistd::Uid::effective().as_raw();
    let defaults = DefaultPaths::of(uid, |name| std::env::var_os(name));
    let config = match &arguments.config {
        Some(path) => Some(path.clone()),
        None => Some(defaults.config.clone()).filter(|path| path.exists()),
    };
    let file = match &config {
        Some(path) => File::read(path)?,
        None => File::default(),
    };
    let choose = |argument: &Option<PathBuf>, configured: &Option<PathBuf>, default: PathBuf| {
        argument
            .clone()
            .or_else(|| configured.clone())
            .unwrap_or(default)
    };
    let state_dir = choose(
        &arguments.state_dir,
        &file.paths.state_dir,
        defaults.state_dir.clone(),
    );
    let run_dir = choose(
        &arguments.run_dir,
        &file.paths.run_dir,
        defaults.run_dir.clone(),
    );
    let socket = choose(
        &arguments.socket,
        &file.paths.socket,
        run_dir.join("kmorphd.sock"),
    );
    let beside = |name: &str| -> PathBuf {
        let own = std::env::current_exe().unwrap_or_default();
        own.parent()
            .map(|dir| dir.join(name))
            .filter(|p| p.exists())
            .unwrap_or_else(|| name.into())
    };
    let agent = choose(&None, &file.paths.agent, beside("kmorph-agent"));
    let kv = choose(&None, &file.paths.kv, beside("kmorph-kv"));
    Ok(Start {
        places: Places {
            config,
            state_dir,
            run_dir,
            kv,
        },
        file,
        socket,
        agent,
    })
}
