//! The wiring: journal, backend, actors, API socket, signals; then the end.

use std::cell::RefCell;
use std::error::Error;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use kmorph_actors::control::{self, Access, Api, DaemonRequest};
use kmorph_actors::events::{Draft, EventLog};
use kmorph_actors::forward::Forwarder;
use kmorph_actors::journal::{Journal, Snapshot};
use kmorph_actors::operations::Operations;
use kmorph_actors::pool::{Pool, Stock};
use kmorph_actors::publish::Publisher;
use kmorph_actors::services::{Numbers, Services};
use kmorph_actors::settings::Settings;
use kmorph_actors::supervisor::{ApplySettings, GetDaemon, Stopping, Supervisor};
use kmorph_actors::transport::TransportHandle;
use kmorph_backends::contract::Backend;
use kmorph_backends::embedded::{EmbeddedBackend, EmbeddedConfig};
use kmorph_backends::multikernel::{MultikernelBackend, MultikernelConfig};
use kmorph_backends::qemu::{AccelChoice, KerfConfig, QemuBackend, QemuConfig};
use kmorph_control_api::{ApiError, ErrorCode, OperationKind, ReloadReport};
use slog::{Logger, info, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::Start;
use crate::config::{Accel, Backend as BackendChoice, ConfigError, File, Transport};
use crate::logging;

/// Requests to the daemon itself that may wait.
const DAEMON_REQUESTS_MAX: usize = 8;
/// Longest time a graceful stop waits for operations under way.
const GRACEFUL_TIMEOUT: Duration = Duration::from_secs(600);
/// How often a graceful stop looks.
const GRACEFUL_POLL: Duration = Duration::from_millis(100);
/// Longest wait for captures to end and their instances to go on.
const CAPTURES_END_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked whether the actors that cannot be replaced are alive.
const VITAL_INTERVAL: Duration = Duration::from_millis(250);
/// QEMU, looked up in PATH.
const QEMU: &str = "qemu-system-x86_64";
/// The vhost-user vsock device, looked up in PATH.
const VHOST_VSOCK: &str = "vhost-device-vsock";
/// Where `scripts/fetch-vhost-vsock` leaves it in the cache directory.
const FETCHED_VHOST_VSOCK: &str = "tools/bin/vhost-device-vsock";
/// The host's side of kerf-vsock.
const KERF_HOST: &str = "kmorph-kerf-host";
/// Where `make kmod` puts its modules, in the cache.
const BUILT_MODULES: &str = "kmod";

type Fault = Box<dyn Error>;

/// Runs the daemon until it is told to stop.
pub(crate) fn run(start: Start, settings: Settings) -> Result<(), Fault> {
    let log = logging::logger(&start.file.log);
    match kmorph_launch::stay_resident() {
        Ok(true) => {}
        Ok(false) => info!(
            log,
            "not locked in memory: paging can delay what it does; to allow it, \
            LimitMEMLOCK=infinity in its unit"
        ),
        Err(error) => warn!(log, "not locked in memory"; "error" => %error),
    }
    make_dir(&settings.state_dir)?;
    make_dir(&settings.run_dir)?;
    let system = System::new();
    system.block_on(serve(start, settings, log))
}

fn make_dir(path: &Path) -> Result<(), Fault> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path);
    made.map_err(|error| {
        format!(
            "the directory {path:?} cannot be made: {error}; name another with --state-dir, \
                 --run-dir or [paths]"
        )
        .into()
    })
}

async fn serve(start: Start, settings: Settings, log: Logger) -> Result<(), Fault> {
    let (journal, snapshot, arbiter) = Journal::open(&settings.state_dir)?;
    let backend = choose_backend(&start)?;
    let detail = backend.probe().await?;
    let settings = with_kernel_pool(&start, settings)?;
    let socket = free_socket(&start.socket)?;
    let services = services(&log, journal.clone(), backend, &settings, &snapshot)?;
    let (operations, events) = (services.operations.clone(), services.events.clone());
    let supervisor = Supervisor::new(services, snapshot, detail.clone()).start();
    // Answered only after everything is restored: the API never shows half of it.
    supervisor.send(GetDaemon).await?;
    let (sender, mut requests) = mpsc::channel(DAEMON_REQUESTS_MAX);
    let access = Access::new(settings.control_group.clone());
    let api = Api::new(
        supervisor.clone(),
        operations.clone(),
        events.clone(),
        access.clone(),
        sender,
    );
    let (handle, server) = control::serve(&socket, api)
        .map_err(|error| format!("the control socket {socket:?} cannot be made: {error}"))?;
    actix::spawn(server);
    info!(log, "ready"; "socket" => %socket.display(), "backend" => detail,
        "pid" => std::process::id());
    events.publish(Draft::daemon("started"));
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut vital = tokio::time::interval(VITAL_INTERVAL);
    let end = loop {
        tokio::select! {
            _ = hangup.recv() => match reload(&start, &supervisor, &access).await {
                Ok(report) => info!(log, "reloaded"; "applied" => report.applied.join(", ")),
                Err(error) => warn!(log, "not reloaded: {}", error),
            },
            _ = terminate.recv() => break End::Asked { graceful: false },
            _ = interrupt.recv() => break End::Asked { graceful: false },
            _ = vital.tick() => {
                if !journal.connected() {
                    break End::Fault("journal");
                }
                if !supervisor.connected() {
                    break End::Fault("supervisor");
                }
            }
            request = requests.recv() => match request {
                Some(DaemonRequest::Reload(answer)) => {
                    let _ = answer.send(reload(&start, &supervisor, &access).await);
                }
                Some(DaemonRequest::Stop { graceful }) => break End::Asked { graceful },
                None => break End::Asked { graceful: false },
            },
        }
    };
    supervisor.do_send(Stopping);
    if let End::Asked { graceful: true } = end {
        finish_operations(&log, &operations).await;
    }
    end_captures(&log, &operations).await;
    info!(log, "stopping; instances run on");
    events.publish(Draft::daemon("stopped"));
    handle.stop(false).await;
    let _ = std::fs::remove_file(&socket);
    arbiter.stop();
    let _ = arbiter.join();
    match end {
        End::Asked { .. } => Ok(()),
        End::Fault(actor) => Err(format!(
            "its {actor} actor panicked, and without it nothing can be changed safely; instances run \
             on, and kmorphd adopts them when it is started again"
        )
        .into()),
    }
}

/// Why the daemon ends.
enum End {
    /// It was told to.
    Asked {
        /// What is under way is finished first.
        graceful: bool,
    },
    /// An actor that cannot be replaced is gone: the journal holds the lock and the database, the
    /// supervisor all that is known of the instances. A new daemon reads both anew.
    Fault(&'static str),
}

async fn finish_operations(log: &Logger, operations: &Operations) {
    let wait = async {
        while operations.running() > 0 {
            tokio::time::sleep(GRACEFUL_POLL).await;
        }
    };
    if tokio::time::timeout(GRACEFUL_TIMEOUT, wait).await.is_err() {
        warn!(
            log,
            "operations are still under way; the next start finishes or undoes them"
        );
    }
}

/// An instance that is frozen for a capture is resumed before there is no daemon to do it.
async fn end_captures(log: &Logger, operations: &Operations) {
    let wait = async {
        while operations.cancel_all(OperationKind::VmcoreCapture) > 0 {
            tokio::time::sleep(GRACEFUL_POLL).await;
        }
    };
    if tokio::time::timeout(CAPTURES_END_TIMEOUT, wait)
        .await
        .is_err()
    {
        warn!(
            log,
            "a capture has not ended; the next start resumes its instance"
        );
    }
}

fn choose_backend(start: &Start) -> Result<Arc<dyn Backend>, Fault> {
    let agent = start.agent.clone();
    match start.file.backend {
        BackendChoice::Embedded => {
            let backend = EmbeddedBackend::new(EmbeddedConfig { agent })?;
            Ok(Arc::new(backend))
        }
        BackendChoice::Qemu => {
            let configured = &start.file.qemu;
            let beside_the_images = start.cache_dir.join(FETCHED_VHOST_VSOCK);
            let fetched = beside_the_images.is_file().then_some(beside_the_images);
            let vhost_vsock = configured.vhost_vsock.clone().or(fetched);
            let config = QemuConfig {
                agent,
                program: configured.program.clone().unwrap_or(QEMU.into()),
                vhost_vsock: vhost_vsock.unwrap_or(VHOST_VSOCK.into()),
                kerf: kerf(start),
                accel: match configured.accel {
                    Accel::Auto => AccelChoice::Auto,
                    Accel::Kvm => AccelChoice::Kvm,
                    Accel::Tcg => AccelChoice::Tcg,
                },
                modules: configured.modules.clone(),
                cache: start.cache_dir.clone(),
            };
            Ok(Arc::new(QemuBackend::new(config)?))
        }
        BackendChoice::Multikernel => Ok(Arc::new(MultikernelBackend::new(multikernel(start))?)),
    }
}

fn multikernel(start: &Start) -> MultikernelConfig {
    let configured = &start.file.multikernel;
    MultikernelConfig {
        agent: start.agent.clone(),
        root: configured.root.clone(),
        lock: configured.lock.clone(),
        records: configured.records.clone(),
        modules: configured.modules.clone(),
        cache: start.cache_dir.clone(),
        vsock: configured.vsock(),
    }
}

/// With the multikernel backend the pool is the kernel's own. What it refuses, the backend tells; here it is
/// for those who look.
fn with_kernel_pool(start: &Start, settings: Settings) -> Result<Settings, String> {
    if start.file.backend != BackendChoice::Multikernel {
        return Ok(settings);
    }
    let pool = MultikernelBackend::pool(&multikernel(start));
    let pool = pool.map_err(|error| format!("reading the kernel's pool: {error}"))?;
    Ok(Settings {
        pool: Stock {
            cpus: pool.cpus,
            cpus_shared: false,
            memory_bytes: pool.memory_bytes,
            bookkeeping_bytes: pool.bookkeeping_bytes,
        },
        ..settings
    })
}

/// kerf-vsock, where it is chosen: its program beside the daemon's own, the modules where `make kmod` puts
/// them.
fn kerf(start: &Start) -> Option<KerfConfig> {
    let configured = &start.file.qemu;
    let beside = || {
        let own = std::env::current_exe().ok()?;
        Some(own.with_file_name(KERF_HOST)).filter(|path| path.is_file())
    };
    let program = configured.kerf_host.clone().or_else(beside);
    let modules = configured.kerf_modules.clone();
    (configured.transport == Transport::Kerf).then(|| KerfConfig {
        program: program.unwrap_or(KERF_HOST.into()),
        modules: modules.unwrap_or_else(|| start.cache_dir.join(BUILT_MODULES)),
    })
}

/// The socket's path, free of what an earlier daemon left there. The lock on the state directory is
/// held already, but another daemon with another state directory may use the same socket.
fn free_socket(path: &Path) -> Result<std::path::PathBuf, Fault> {
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(path.to_owned()),
        Err(error) => return Err(format!("looking at the control socket {path:?}: {error}").into()),
        Ok(there) if !there.file_type().is_socket() => {
            let text = "is there already and is no socket; give another path";
            return Err(format!("the control socket {path:?} cannot be made: it {text}").into());
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(format!("another daemon answers on the control socket {path:?}").into()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
            Ok(path.to_owned())
        }
        Err(_) => Ok(path.to_owned()),
    }
}

fn services(
    log: &Logger,
    journal: Addr<Journal>,
    backend: Arc<dyn Backend>,
    settings: &Settings,
    snapshot: &Snapshot,
) -> Result<Services, Fault> {
    let events = EventLog::new(snapshot.events.clone(), journal.clone());
    let operations = Operations::new(snapshot.operations.clone(), journal.clone());
    let numbers = Numbers {
        generations: snapshot.last_generation.clone(),
        recovery: snapshot.recoveries.last().map_or(0, |r| r.record.id),
        session: snapshot.morphs.last().map_or(0, |m| m.status.session),
        cids: std::collections::BTreeSet::new(),
    };
    let pool = Pool::new(settings.pool.clone());
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|error| format!("reading the host's boot id: {error}"))?;
    Ok(Services {
        log: log.clone(),
        journal,
        backend,
        transport: TransportHandle::start(log),
        captures: kmorph_actors::vmcore::Captures::default(),
        events,
        operations,
        pool: Rc::new(RefCell::new(pool)),
        settings: Rc::new(RefCell::new(settings.clone())),
        publisher: Rc::new(RefCell::new(Publisher::default())),
        forwarder: Rc::new(RefCell::new(Forwarder::default())),
        numbers: Rc::new(RefCell::new(numbers)),
        incarnation: snapshot.incarnation,
        host_boot_id: boot_id.trim().to_owned(),
    })
}

/// The settings of a configuration that is read again, for the backend that runs. One that is for the multikernel
/// backend has no pool, and another still needs one.
fn in_force(start: &Start, file: &File) -> Result<Settings, ConfigError> {
    let settings = file.settings(start.places.clone())?;
    if file.backend != BackendChoice::Multikernel {
        return Ok(settings);
    }
    let with_pool = File {
        backend: start.file.backend,
        ..file.clone()
    };
    with_pool.settings(start.places.clone())
}

/// Reads the configuration again; applies all of it, or nothing.
async fn reload(
    start: &Start,
    supervisor: &Addr<Supervisor>,
    access: &Access,
) -> Result<ReloadReport, ApiError> {
    let Some(path) = &start.places.config else {
        let text = "this daemon was started without a configuration file";
        return Err(ApiError::new(ErrorCode::WrongState, text));
    };
    let refuse = |error: ConfigError| {
        ApiError::new(ErrorCode::InvalidRequest, error.to_string()).hint("nothing was changed")
    };
    let file = File::read(path).map_err(refuse)?;
    let settings = in_force(start, &file).map_err(refuse)?;
    let settings = with_kernel_pool(start, settings)
        .map_err(|reason| ApiError::new(ErrorCode::Unavailable, reason))?;
    let mut needs_restart = Vec::new();
    if file.backend != start.file.backend {
        needs_restart.push("backend".to_owned());
    }
    if file.paths != start.file.paths {
        needs_restart.push("paths".to_owned());
    }
    if file.qemu != start.file.qemu {
        needs_restart.push("qemu".to_owned());
    }
    if file.multikernel != start.file.multikernel {
        needs_restart.push("multikernel".to_owned());
    }
    if file.log != start.file.log {
        needs_restart.push("log".to_owned());
    }
    access.set_group(settings.control_group.clone());
    let applied = supervisor.send(ApplySettings(Box::new(settings))).await;
    let busy = |_| ApiError::new(ErrorCode::Busy, "the supervisor is being replaced");
    Ok(ReloadReport {
        applied: applied.map_err(busy)?,
        needs_restart,
    })
}
