//! `kmorph-kv`: an in-memory key-value server that speaks RESP and can be moved to another kernel
//! while its clients stay connected.

mod commands;
mod connection;
mod glob;
mod info;
mod options;
mod provider;
mod resp;
mod server;

use std::io::Write;
use std::net::TcpListener;
use std::process::ExitCode;

use kmorph_workload::activation::take_listeners;
use kmorph_workload::handover::message::Role;
use kmorph_workload::session::{Session, SessionError};
use kmorph_workload::store::Store;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use info::Facts;
use options::Options;
use server::{Server, ServerError};

/// Number of descriptors reserved for other uses than clients.
const SPARE_DESCRIPTORS: u64 = 96;
/// Usage error, as in sysexits.h.
const EXIT_USAGE: u8 = 64;
/// The store is damaged or belongs to another process.
const EXIT_STATE: u8 = 70;
/// A system call failed.
const EXIT_SYSTEM: u8 = 71;
/// The agent is gone or has fenced this process.
const EXIT_AGENT: u8 = 75;

fn main() -> ExitCode {
    let options = match options::parse(std::env::args().skip(1)) {
        Ok(options::Parsed::Run(options)) => options,
        Ok(options::Parsed::Help) => return print(options::HELP),
        Ok(options::Parsed::Version) => {
            return print(concat!("kmorph-kv ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        Err(text) => return fail(EXIT_USAGE, &text),
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Start(text)) => fail(EXIT_SYSTEM, &text),
        Err(Failure::Server(error)) => {
            let code = match &error {
                ServerError::Store(_) => EXIT_STATE,
                ServerError::Session(_) => EXIT_AGENT,
                ServerError::System { .. } => EXIT_SYSTEM,
            };
            fail(code, &error.to_string())
        }
    }
}

enum Failure {
    Start(String),
    Server(ServerError),
}

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Self {
        Self::Server(error)
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        Self::Server(error.into())
    }
}

fn print(text: &str) -> ExitCode {
    // A pipe that was closed by its reader is not an error.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn fail(code: u8, text: &str) -> ExitCode {
    eprintln!("kmorph-kv: {text}");
    ExitCode::from(code)
}

fn run(options: &Options) -> Result<(), Failure> {
    let start = |text: String| Failure::Start(text);
    // SAFETY: the process has just started; no code has taken a descriptor by its number.
    let activated = unsafe { take_listeners() }.map_err(|error| start(error.to_string()))?;
    // SAFETY: as above, and it comes after the listening sockets.
    let mut session = unsafe { Session::from_env() }?;
    let max_clients = client_limit(options.max_clients);
    let mut server = Server::new(Facts::from_env(options.limits(), max_clients))?;
    for (name, socket) in activated {
        server.add_listener(name, socket)?;
    }
    for address in &options.listen {
        let listener = TcpListener::bind(address)
            .map_err(|error| start(format!("listening on {address}: {error}")))?;
        if let Ok(bound) = listener.local_addr() {
            eprintln!("kmorph-kv: listening on {bound}");
        }
        server.add_listener("listen".to_owned(), listener.into())?;
    }
    let role = match &mut session {
        None if server.listeners.is_empty() => {
            return Err(start(
                "nothing to listen on: give --listen; see --help".to_owned(),
            ));
        }
        None => Role::Serve,
        Some(session) => register(session, &mut server)?,
    };
    if role == Role::Serve {
        let store = Store::create(options.max_memory).map_err(ServerError::from)?;
        server.store = Some(store);
    }
    Ok(server.run(session)?)
}

fn register(session: &mut Session, server: &mut Server) -> Result<Role, SessionError> {
    let registration = session.register(server)?;
    let facts = &mut server.facts;
    facts.instance = registration.instance;
    facts.generation = registration.generation.to_string();
    if !registration.kernel_release.is_empty() {
        facts.kernel_release = registration.kernel_release;
    }
    Ok(registration.role)
}

/// Raises the limit on descriptors as far as permitted. Returns the number of clients that it allows.
fn client_limit(wanted: usize) -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return wanted;
    };
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if raised { hard } else { soft };
    let room = usize::try_from(limit.saturating_sub(SPARE_DESCRIPTORS)).unwrap_or(usize::MAX);
    wanted.min(room).max(1)
}
