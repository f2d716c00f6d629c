//! The wiring: journal, backend, actors, API socket, signals; then the end.

use std::cell::RefCell;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use kmorph_actors::capture::Captures;
use kmorph_actors::control::{self, Access, Api, DaemonRequest};
use kmorph_actors::generation::Generations;
use kmorph_actors::generation::machine::Machine;
use kmorph_actors::generation::release::Ledger;
use kmorph_actors::model::OperationKind;
use kmorph_actors::model::settings::{Settings, Stock};
use kmorph_actors::morph::Downtimes;
use kmorph_actors::platform::aside::Turn;
use kmorph_actors::platform::events::{Draft, EventLog};
use kmorph_actors::platform::journal::{Journal, KeepBackups, Snapshot};
use kmorph_actors::platform::operations::Operations;
use kmorph_actors::platform::transport::{SystemNetwork, TransportHandle};
use kmorph_actors::platform::{self, Platform};
use kmorph_actors::resources::Resources;
use kmorph_actors::resources::numbers::Numbers;
use kmorph_actors::resources::pool::Pool;
use kmorph_actors::resources::ports::Ports;
use kmorph_actors::services::Services;
use kmorph_actors::supervisor::{ApplySettings, GetDaemon, Stopping, Supervisor};
use kmorph_backends::cgroup::Cgroups;
use kmorph_backends::contract::Backend;
use kmorph_backends::embedded::{EmbeddedBackend, EmbeddedConfig};
use kmorph_backends::multikernel::{MultikernelBackend, MultikernelConfig};
use kmorph_backends::qemu::{AccelChoice, KerfConfig, QemuBackend, QemuConfig};
use kmorph_control_api::{ApiError, ErrorCode, ReloadReport};
use kmorph_files::{OwnDir, PRIVATE_DIR};
use slog::{Logger, info, warn};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::Start;
use crate::config::{
    Accel, Backend as BackendChoice, ConfigError, File, Transport, changed_keys, is_read_once,
};
use crate::{foreign, logging, panics, places, signals};

/// Requests to the daemon itself that may wait.
const DAEMON_REQUESTS_MAX: usize = 8;
/// Longest time a graceful stop waits for operations under way.
const GRACEFUL_TIMEOUT: Duration = Duration::from_secs(600);
/// How often a graceful stop looks.
const GRACEFUL_POLL: Duration = Duration::from_millis(100);
/// Longest time for the configuration to be read again.
const CONFIG_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for captures to end and their instances to go on.
const CAPTURES_END_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the journal's disk at the end.
const JOURNAL_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked whether the actors that cannot be replaced are alive.
const VITAL_INTERVAL: Duration = Duration::from_millis(250);
/// The directory in it with those of the instances.
const INSTANCES: &str = "instances";
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

/// The file with the id of the newest event, in the runtime directory.
const EVENT_ID_NAME: &str = "event-id";

pub(crate) type Fault = Box<dyn Error>;

/// Runs the daemon until it is told to stop.
pub(crate) fn run(start: Start, settings: Settings) -> Result<(), Fault> {
    let (log, _written) = signals::kept_from_threads(|| logging::logger(&start.file.log))?;
    if let Err(error) = kmorph_launch::descriptor_limit::raise() {
        warn!(log, "the limit of open descriptors stays as it is: many instances may need more";
            "error" => %error);
    }
    match kmorph_launch::stay_resident() {
        Ok(true) => {}
        Ok(false) => info!(
            log,
            "not locked in memory: paging can delay what it does; to allow it, \
            LimitMEMLOCK=infinity in its unit"
        ),
        Err(error) => warn!(log, "not locked in memory"; "error" => %error),
    }
    let run_dir = places::make_dir(&settings.run_dir)?;
    run_dir
        .below(INSTANCES, PRIVATE_DIR)
        .map_err(places::unusable)?;
    if start.file.backend != BackendChoice::Embedded && start.cache_dir.exists() {
        // Programs and images in it are run.
        OwnDir::shared(&start.cache_dir).map_err(places::unusable)?;
    }
    let system = System::new();
    let ended = system.block_on(serve(start, settings, log));
    // Dropped, each actor would handle what waits for it once more, start included, with no runtime around it. The
    // process ends now, and what is under way ends with it the way it does when the daemon is killed.
    std::mem::forget(system);
    ended
}

async fn serve(start: Start, settings: Settings, log: Logger) -> Result<(), Fault> {
    // From here on these are told of signals; what came before was noted.
    let hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let hung_up_early = signals::take_hangup();
    if signals::told_to_end() {
        info!(log, "told to end while it started");
        return Ok(());
    }
    let (journal, snapshot, arbiter) = Journal::open(&settings.state_dir)?;
    let mut panics = panics::so_far();
    let begun = tokio::select! {
        begun = begin(&start, settings, &log, journal.clone(), snapshot) => begun.map(Some),
        _ = terminate.recv() => Ok(None),
        _ = interrupt.recv() => Ok(None),
    };
    let ended = match begun {
        Ok(Some(running)) => {
            let signals = Signals {
                hangup,
                terminate,
                interrupt,
            };
            let ended = watch(&start, running, &journal, signals, hung_up_early, &log).await;
            ended.map(|noted| panics = noted)
        }
        Ok(None) => {
            info!(log, "told to end while it started");
            Ok(())
        }
        Err(fault) => Err(fault),
    };
    close(&log, &journal, arbiter).await;
    ended?;
    match panics::so_far() == panics {
        true => Ok(()),
        false => Err("an actor panicked while the daemon ended; instances run on, and kmorphd adopts them when it \
             is started again"
            .into()),
    }
}

/// What the daemon is told from outside once it runs.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

/// Serves until the daemon is to end, and ends all but the journal; how many panics there had been when its end began.
async fn watch(
    start: &Start,
    running: Running,
    journal: &Addr<Journal>,
    signals: Signals,
    hung_up_early: bool,
    log: &Logger,
) -> Result<usize, Fault> {
    let Signals {
        mut hangup,
        mut terminate,
        mut interrupt,
    } = signals;
    let Running {
        supervisor,
        operations,
        events,
        access,
        mut requests,
        handle,
        socket,
        mut now,
    } = running;
    events.publish(Draft::daemon("started"));
    if hung_up_early {
        tell(log, reload(start, &mut now, &supervisor, &access).await);
    }
    let mut vital = tokio::time::interval(VITAL_INTERVAL);
    let end = loop {
        tokio::select! {
            _ = hangup.recv() => tell(log, reload(start, &mut now, &supervisor, &access).await),
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
                    let _ = answer.send(reload(start, &mut now, &supervisor, &access).await);
                }
                Some(DaemonRequest::Stop { graceful }) => break End::Asked { graceful },
                None => break End::Asked { graceful: false },
            },
        }
    };
    let panics = panics::so_far();
    supervisor.do_send(Stopping);
    if let End::Asked { graceful: true } = end {
        finish_operations(log, &operations).await;
    }
    end_captures(log, &operations).await;
    info!(log, "stopping; instances run on");
    events.publish(Draft::daemon("stopped"));
    handle.stop().await;
    let _ = std::fs::remove_file(&socket);
    match end {
        End::Asked { .. } => Ok(panics),
        End::Fault(actor) => Err(format!(
            "its {actor} actor panicked, and without it nothing can be changed safely; instances run \
             on, and kmorphd adopts them when it is started again"
        )
        .into()),
    }
}

/// Has the journal write what it was told, and ends its thread.
async fn close(log: &Logger, journal: &Addr<Journal>, arbiter: Arbiter) {
    // Its thread ends with what stands in line unwritten, so that is waited for.
    let written = platform::journal::record(journal, Vec::new());
    if tokio::time::timeout(JOURNAL_CLOSE_TIMEOUT, written)
        .await
        .is_err()
    {
        warn!(
            log,
            "the journal's disk does not answer: the last events may be missing from it"
        );
        return;
    }
    arbiter.stop();
    let _ = arbiter.join();
}

/// What runs once the daemon has started.
struct Running {
    supervisor: Addr<Supervisor>,
    operations: Operations,
    events: EventLog,
    access: Access,
    requests: mpsc::Receiver<DaemonRequest>,
    handle: control::Handle,
    socket: PathBuf,
    now: InForce,
}

/// Starts everything, the API last.
async fn begin(
    start: &Start,
    settings: Settings,
    log: &Logger,
    journal: Addr<Journal>,
    snapshot: Snapshot,
) -> Result<Running, Fault> {
    foreign::refuse(&snapshot, start.file.backend.kind(), &settings.state_dir)?;
    journal.do_send(KeepBackups {
        dir: settings.state_dir.clone(),
        log: log.clone(),
    });
    let backend = choose_backend(start, &settings.run_dir)?;
    let detail = backend.probe().await?;
    let settings = with_kernel_pool(start, settings)?;
    let socket = places::free_socket(&start.socket)?;
    let services = services(log, journal, backend, &settings, &snapshot)?;
    let (operations, events) = (
        services.platform.operations.clone(),
        services.platform.events.clone(),
    );
    let supervisor = Supervisor::new(services, snapshot, detail.clone()).start();
    // Answered only after everything is restored: the API never shows half of it.
    supervisor.send(GetDaemon).await?;
    let (sender, requests) = mpsc::channel(DAEMON_REQUESTS_MAX);
    let access = Access::new(settings.control_group.clone());
    let api = Api::new(
        supervisor.clone(),
        operations.clone(),
        events.clone(),
        access.clone(),
        sender,
    );
    let handle = control::serve(&socket, api)
        .map_err(|error| format!("the control socket {socket:?} cannot be made: {error}"))?;
    info!(log, "ready"; "socket" => %socket.display(), "backend" => detail,
        "pid" => std::process::id());
    Ok(Running {
        supervisor,
        operations,
        events,
        access,
        requests,
        handle,
        socket,
        now: InForce {
            file: start.file.clone(),
            pool: settings.pool,
        },
    })
}

/// Says what came of a reload that nobody waits for.
fn tell(log: &Logger, reloaded: Result<ReloadReport, ApiError>) {
    match reloaded {
        Ok(report) => info!(log, "reloaded"; "applied" => report.applied.join(", ")),
        Err(error) => warn!(log, "not reloaded: {}", error),
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

fn choose_backend(start: &Start, run_dir: &Path) -> Result<Arc<dyn Backend>, Fault> {
    let agent = start.agent.clone();
    match start.file.backend {
        BackendChoice::Embedded => {
            let backend = EmbeddedBackend::new(EmbeddedConfig {
                agent,
                cgroups: Arc::new(Cgroups::find_limiting_memory(run_dir)),
            })?;
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
                cgroups: Arc::new(Cgroups::find(run_dir)),
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
        layout: configured.layout(),
        memory: configured.memory(),
        xdp_pins: kmorph_backends::multikernel::XDP_PINS.into(),
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

fn services(
    log: &Logger,
    journal: Addr<Journal>,
    backend: Arc<dyn Backend>,
    settings: &Settings,
    snapshot: &Snapshot,
) -> Result<Services, Fault> {
    let operations = Operations::new(snapshot.operations.clone(), journal.clone());
    let numbers = Numbers {
        generations: snapshot.last_generation.clone(),
        recovery: snapshot.recoveries.last().map_or(0, |r| r.record.id),
        session: snapshot.morphs.last().map_or(0, |m| m.status.session),
        cids: std::collections::BTreeMap::new(),
    };
    let pool = Pool::new(settings.pool.clone());
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|error| format!("reading the host's boot id: {error}"))?;
    let boot_id = boot_id.trim().to_owned();
    let mark = settings.run_dir.join(EVENT_ID_NAME);
    let events = EventLog::new(snapshot.events.clone(), journal.clone(), &mark, &boot_id)
        .map_err(|error| format!("the file {mark:?} cannot be opened: {error}"))?;
    let platform = Platform {
        log: log.clone(),
        journal,
        transport: TransportHandle::start(log, Arc::new(SystemNetwork)),
        events: events.clone(),
        operations,
        settings: Rc::new(RefCell::new(settings.clone())),
    };
    let resources = Resources {
        pool: Rc::new(RefCell::new(pool)),
        numbers: Rc::new(RefCell::new(numbers)),
        ports: Ports::new(Arc::clone(&backend), log.clone(), events),
    };
    let machine = Machine {
        backend,
        spawn_turn: Turn::default(),
        incarnation: snapshot.incarnation,
        host_boot_id: boot_id,
        log: log.clone(),
    };
    let generations = Generations {
        platform: platform.clone(),
        resources,
        machine,
        kept: Ledger::default(),
    };
    let downtimes = Downtimes::from_journal(&snapshot.morphs);
    Ok(Services {
        captures: Captures::new(platform.clone(), generations.clone()),
        platform,
        generations,
        downtimes: Rc::new(RefCell::new(downtimes)),
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

/// Reads the configuration on another thread: its file system may not answer.
async fn read_aside(path: PathBuf) -> Result<Result<File, ConfigError>, ApiError> {
    let named = path.display().to_string();
    let reading = tokio::task::spawn_blocking(move || File::read(&path));
    match tokio::time::timeout(CONFIG_TIMEOUT, reading).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) => Err(ApiError::new(ErrorCode::Internal, error.to_string())),
        Err(_) => {
            let text =
                format!("the configuration {named} could not be read within {CONFIG_TIMEOUT:?}");
            Err(ApiError::new(ErrorCode::Timeout, text)
                .hint("nothing was changed; does its file system answer?"))
        }
    }
}

/// What the last reload, or the start, has put in force.
struct InForce {
    file: File,
    pool: Stock,
}

/// Reads the configuration again; applies all of it, or nothing.
async fn reload(
    start: &Start,
    now: &mut InForce,
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
    let file = read_aside(path.clone()).await?.map_err(refuse)?;
    let settings = in_force(start, &file).map_err(refuse)?;
    let settings = with_kernel_pool(start, settings)
        .map_err(|reason| ApiError::new(ErrorCode::Unavailable, reason))?;
    let changed = changed_keys(&now.file, &file);
    let mut applied: Vec<_> = changed.into_iter().filter(|k| !is_read_once(k)).collect();
    if start.file.backend == BackendChoice::Multikernel && now.pool != settings.pool {
        applied.push("the kernel's pool".to_owned());
    }
    let waiting = changed_keys(&start.file, &file);
    let needs_restart = waiting.into_iter().filter(|k| is_read_once(k)).collect();
    let pool = settings.pool.clone();
    access.set_group(settings.control_group.clone());
    let busy = |_| ApiError::new(ErrorCode::Busy, "the supervisor is being replaced");
    let told = supervisor.send(ApplySettings(Box::new(settings))).await;
    told.map_err(busy)?;
    *now = InForce { file, pool };
    Ok(ReloadReport {
        applied,
        needs_restart,
    })
}
