//! Executes commands: one function per command, which sends requests and prints the answers.

mod capture;
mod daemon;
mod detach;
mod doctor;
mod events;
mod import;
mod input;
mod instance;
mod morph;
mod operation;
mod policy;
mod recovery;
mod shell;
mod spawn;
mod status;
mod vmcore;

use std::path::Path;
use std::time::Duration;

use kmorph_control_api::KeptGeneration;

use crate::cli::{Cli, Command, DaemonCommand, DebugCommand, VmcoreCommand};
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::figures::{bytes, cpu_list, local_time};
use crate::output::Output;
use crate::places::Places;

/// Returns an ended generation that still holds CPUs and memory, in one line.
fn kept(kept: &KeptGeneration) -> String {
    format!(
        "generation {}: CPUs {}, {}, since {} ({} tries): {}",
        kept.generation,
        cpu_list(&kept.cpus),
        bytes(kept.memory_bytes),
        local_time(&kept.since),
        kept.tries,
        kept.reason
    )
}

/// Runs one command.
pub(crate) async fn run(cli: Cli, out: &mut Output) -> Result<Exit, Failure> {
    let config = match &cli.command {
        Command::Daemon(DaemonCommand::Start(start)) => start.config.as_deref(),
        _ => None,
    };
    let places = Places::find(cli.socket, config);
    let timeout = Duration::from_secs_f64(cli.timeout);
    let client = &Client::new(places.socket.clone(), timeout, places.socket_is_default);
    match cli.command {
        Command::Daemon(command) => daemon::run(client, out, &places, command).await,
        Command::Spawn(args) => spawn::run(client, out, *args).await,
        Command::List { verbose } => status::list(client, out, verbose).await,
        Command::Status(name) => status::status(client, out, &name.name).await,
        Command::Terminate(args) => instance::terminate(client, out, &args).await,
        Command::Heartbeat(name) => status::heartbeat(client, out, &name.name).await,
        Command::Health(args) => status::health(client, out, &args).await,
        Command::Ping(args) => instance::ping(client, out, &args).await,
        Command::Recover { name, wait } => instance::recover(client, out, &name, wait).await,
        Command::RecoveryLog { instance, since } => {
            recovery::log(client, out, instance, since).await
        }
        Command::Morph(args) => morph::run(client, out, *args).await,
        Command::Policy(command) => policy::run(client, out, command).await,
        Command::Operation(command) => operation::run(client, out, command).await,
        Command::Events {
            instance,
            follow,
            since_id,
            count,
        } => {
            let wanted = events::Wanted {
                instance,
                follow,
                since_id,
                count,
            };
            events::show(client, out, wanted).await
        }
        Command::Completions { shell } => shell::completions(out, shell),
        Command::Man { dir } => shell::man(out, &dir),
        Command::ImportUpstreamConfig(args) => import::run(out, &args),
        Command::Monitor { .. } => Err(not_built_yet("monitor")),
        Command::Doctor(args) => doctor::run(client, out, &args).await,
        Command::Vmcore(VmcoreCommand::Capture(args)) => capture::capture(client, out, &args).await,
        Command::Vmcore(VmcoreCommand::Analyze(args)) => vmcore::analyze(out, &args),
        Command::Debug(DebugCommand::Console) => Err(not_built_yet("debug console")),
    }
}

fn not_built_yet(what: &str) -> Failure {
    let text = format!("`kmorphctl {what}` is not built yet");
    Failure::new(Exit::NotImplemented, text)
}

/// Returns a path in the daemon's form: absolute, in UTF-8. Symbolic links stay.
fn absolute(path: &Path) -> Result<String, Failure> {
    let absolute =
        std::path::absolute(path).map_err(|error| Failure::file("find", path, &error))?;
    absolute.into_os_string().into_string().map_err(|path| {
        let text = format!("the path {} is not UTF-8", path.to_string_lossy());
        Failure::invalid(text)
    })
}
