//! kmorphd: reads the configuration, handles signals, opens sockets, and starts the actors, which do the work.

mod config;
#[cfg(test)]
mod documents;
mod foreign;
mod logging;
mod panics;
mod places;
mod run;
mod signals;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use kmorph_actors::platform::journal::Journal;
use kmorph_control_api::paths::DefaultPaths;

use config::{File, Places};

const AFTER_HELP: &str = "\
On SIGHUP, even during startup, kmorphd rereads its configuration; on SIGTERM and SIGINT it stops. Instances keep running \
and the next daemon adopts them.

docs/configuration.md describes the configuration, docs/operations.md the operation. kmorphctl(1) \
controls the daemon.";

/// Monitors, recovers and morphs kernel instances.
#[derive(Debug, Parser)]
#[command(name = "kmorphd", version, after_help = AFTER_HELP, max_term_width = 100)]
struct Arguments {
    /// Configuration file; optional [default: /etc/kmorph/kmorphd.conf for root, else
    /// $XDG_CONFIG_HOME/kmorph/kmorphd.conf].
    #[arg(long)]
    config: Option<PathBuf>,
    /// State directory; overrides the configuration.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// Runtime directory; overrides the configuration.
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Control socket; overrides the configuration.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Check the configuration and its directories, then exit; does not test programs, kernels or KVM.
    #[arg(long)]
    check: bool,
    /// Replace the journal with this backup copy, then exit; no daemon may be using the state directory.
    #[arg(long, value_name = "FILE", conflicts_with = "check")]
    restore_journal: Option<PathBuf>,
    /// Print the manual page to standard output, then exit.
    #[arg(long)]
    man: bool,
}

/// The results of startup that the actors need.
struct Start {
    file: File,
    places: Places,
    socket: PathBuf,
    agent: PathBuf,
    cache_dir: PathBuf,
}

fn main() -> ExitCode {
    panics::count_from_now_on();
    if let Err(error) = signals::note_from_now_on() {
        eprintln!("kmorphd: cannot set up signal handlers: {error}");
        return ExitCode::FAILURE;
    }
    // SAFETY: nothing was opened yet; what is open the caller left so.
    if let Err(error) = unsafe { kmorph_launch::close_all_but(&[]) } {
        eprintln!("kmorphd: cannot close inherited file descriptors: {error}");
        return ExitCode::FAILURE;
    }
    let arguments = Arguments::parse();
    if arguments.man {
        return man();
    }
    let check = arguments.check;
    let result = prepare(&arguments).and_then(|start| {
        let settings = start.file.settings(start.places.clone())?;
        places::fit(&start.places.run_dir, &start.socket)?;
        if check {
            places::look(&start)?;
            println!("the configuration is valid and its directories are usable");
            return Ok(());
        }
        if let Some(copy) = &arguments.restore_journal {
            return restore_journal(&start.places.state_dir, copy);
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

fn restore_journal(
    state_dir: &std::path::Path,
    copy: &std::path::Path,
) -> Result<(), Box<dyn std::error::Error>> {
    match Journal::restore(state_dir, copy)? {
        Some(kept) => {
            println!("restored the journal from {copy:?}; the previous journal is kept as {kept:?}")
        }
        None => println!("restored the journal from {copy:?}"),
    }
    Ok(())
}

/// Made from the command line itself, so it never lags behind it.
fn man() -> ExitCode {
    let page = clap_mangen::Man::new(Arguments::command()).section("8");
    match page.render(&mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kmorphd: the manual page cannot be written: {error}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(arguments: &Arguments) -> Result<Start, Box<dyn std::error::Error>> {
    let uid = nix::unistd::Uid::effective().as_raw();
    let defaults = DefaultPaths::of(uid, |name| std::env::var_os(name));
    let config = match &arguments.config {
        Some(path) => Some(std::path::absolute(path)?),
        None => Some(defaults.config.clone()).filter(|path| path.exists()),
    };
    let file = match &config {
        Some(path) => File::read(path)?,
        None => File::default(),
    };
    // An option is meant from where the command was given; a relative path in the file is refused with its place.
    let options = [&arguments.state_dir, &arguments.run_dir, &arguments.socket];
    let [state_dir, run_dir, socket] = options.map(|option| {
        let given = option.as_ref();
        given.map(std::path::absolute).transpose()
    });
    let choose = |argument: Option<PathBuf>, configured: &Option<PathBuf>, default: PathBuf| {
        argument.or_else(|| configured.clone()).unwrap_or(default)
    };
    let state_dir = choose(
        state_dir?,
        &file.paths.state_dir,
        defaults.state_dir.clone(),
    );
    let run_dir = choose(run_dir?, &file.paths.run_dir, defaults.run_dir.clone());
    let socket = choose(socket?, &file.paths.socket, run_dir.join("kmorphd.sock"));
    let agent = choose(None, &file.paths.agent, program("kmorph-agent"));
    let kv = choose(None, &file.paths.kv, program("kmorph-kv"));
    Ok(Start {
        places: Places {
            config,
            state_dir,
            run_dir,
            kv,
        },
        cache_dir: choose(None, &file.paths.cache_dir, defaults.cache_dir),
        file,
        socket,
        agent,
    })
}

/// Path of one of kmorph's programs: beside this one, else in PATH. If neither exists, the path beside this one, so
/// that a later error names it.
fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.with_file_name(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name));
    let mut places = std::iter::once(beside.clone()).chain(in_path);
    places.find(|place| place.is_file()).unwrap_or(beside)
}
