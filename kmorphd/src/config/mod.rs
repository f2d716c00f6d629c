//! The configuration file: TOML; every key is optional, and unknown keys are refused with their position.

mod difference;
mod multikernel;
mod place;
mod vmcore;

use std::path::{Path, PathBuf};
use std::time::Duration;

use kmorph_actors::model::capability::unkept;
use kmorph_actors::model::settings::Stock;
use kmorph_actors::model::settings::{MorphMode, Settings};
use kmorph_actors::model::{Policy, StuckCpuPolicy, VmcorePolicy};
use kmorph_backends::contract::BackendKind;
use kmorph_files::{NamedFileError, read_named};
use serde::{Deserialize, Serialize};

pub(crate) use difference::{changed_keys, is_read_once};
pub(crate) use multikernel::Multikernel;
pub(crate) use place::Place;
pub(crate) use vmcore::Vmcore;

/// Largest configuration file, in bytes.
pub(crate) const CONFIG_MAX_BYTES: u64 = 1024 * 1024;
/// Memory left to the host when the pool's size is not configured.
const HOST_MEMORY_BYTES: u64 = 1 << 30;

/// The file as it is written.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct File {
    /// `embedded`, `qemu` or `multikernel`.
    pub(crate) backend: Backend,
    pub(crate) paths: Paths,
    pub(crate) control: Control,
    pub(crate) pool: Pool,
    pub(crate) defaults: Defaults,
    pub(crate) limits: Limits,
    pub(crate) morph: Morph,
    pub(crate) vmcore: Vmcore,
    pub(crate) qemu: Qemu,
    pub(crate) multikernel: Multikernel,
    pub(crate) log: Log,
    /// The text of the file, to report positions.
    #[serde(skip)]
    pub(crate) text: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Morph {
    mode: Mode,
    expiry_s: f64,
    downtime_budget_ms: Option<f64>,
}

impl Morph {
    /// The budget for the downtime of a morph: what is configured, or the default of the backend `kind`.
    fn downtime_budget(
        &self,
        kind: BackendKind,
        refuse: impl Fn(&'static str, String) -> ConfigError,
    ) -> Result<Duration, ConfigError> {
        match self.downtime_budget_ms {
            None => Ok(kind.downtime_budget()),
            Some(value) if BUDGETS_MS.contains(&value) => Ok(Duration::from_secs_f64(value / 1e3)),
            Some(value) => Err(refuse(
                "morph.downtime_budget_ms",
                format!("{value} is not a number of milliseconds from 0.001 to 3600000"),
            )),
        }
    }
}

/// Budgets for a downtime that make sense, milliseconds: as `kmorphctl` takes them.
const BUDGETS_MS: std::ops::RangeInclusive<f64> = 0.001..=3_600_000.0;

impl Default for Morph {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            expiry_s: 600.0,
            downtime_budget_ms: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    Auto,
    Rounds,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Backend {
    #[default]
    Embedded,
    Qemu,
    Multikernel,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Paths {
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) run_dir: Option<PathBuf>,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) cache_dir: Option<PathBuf>,
    pub(crate) agent: Option<PathBuf>,
    pub(crate) kv: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Control {
    group: Option<String>,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            group: Some("kmorph".to_owned()),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Pool {
    cpus: Option<Vec<u16>>,
    share_cpus: Option<bool>,
    memory_mib: Option<u64>,
    share_memory: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Defaults {
    heartbeat_timeout_s: f64,
    auto_heal: bool,
    morph_timeout_s: f64,
    memory_mib: u64,
    vmcore: VmcorePolicy,
    stuck_cpu: StuckCpuPolicy,
}

impl Default for Defaults {
    fn default() -> Self {
        // Development's timeout is 60 s, production's 1 s: a daemon that was told nothing errs
        // between them.
        Self {
            heartbeat_timeout_s: 5.0,
            auto_heal: true,
            morph_timeout_s: 60.0,
            memory_mib: 256,
            vmcore: VmcorePolicy::Off,
            stuck_cpu: StuckCpuPolicy::Degraded,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Limits {
    start_timeout_s: f64,
    stop_timeout_s: f64,
    port_hold_s: f64,
    recoveries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            start_timeout_s: 30.0,
            stop_timeout_s: 5.0,
            port_hold_s: 10.0,
            recoveries: 8,
        }
    }
}

/// The qemu backend. Read once, at the daemon's start.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Qemu {
    pub(crate) program: Option<PathBuf>,
    pub(crate) vhost_vsock: Option<PathBuf>,
    pub(crate) transport: Transport,
    pub(crate) kerf_host: Option<PathBuf>,
    pub(crate) kerf_modules: Option<PathBuf>,
    pub(crate) accel: Accel,
    pub(crate) modules: Option<PathBuf>,
}

/// The vsock transport for guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Transport {
    #[default]
    Virtio,
    Kerf,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Accel {
    #[default]
    Auto,
    Kvm,
    Tcg,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    pub(crate) format: Format,
    pub(crate) level: Level,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Format {
    #[default]
    Terminal,
    Json,
    Journald,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    Error,
    Warning,
    #[default]
    Info,
    Debug,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("reading the configuration {path:?}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the configuration {path:?} is larger than {CONFIG_MAX_BYTES} bytes")]
    TooLarge { path: PathBuf },
    #[error("the configuration {path:?} is {found}; name a regular file")]
    NotRegular { path: PathBuf, found: &'static str },
    #[error("the configuration {path:?} is refused:\n{reason}")]
    Parse { path: PathBuf, reason: String },
    #[error("the configuration {path:?} is refused: {}{key}: {reason}", before(*.place))]
    Value {
        path: PathBuf,
        /// Position of the value; none for a default.
        place: Option<Place>,
        key: &'static str,
        reason: String,
    },
}

fn before(place: Option<Place>) -> String {
    place.map_or_else(String::new, |place| format!("{place}: "))
}

impl File {
    /// Reads and parses the file at `path`. The parser's message names line and column.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let owned = || path.to_owned();
        let read = |source| ConfigError::Read {
            path: owned(),
            source,
        };
        let bytes = read_named(path, CONFIG_MAX_BYTES).map_err(|error| match error {
            NamedFileError::System { source, .. } => read(source),
            NamedFileError::TooLarge { .. } => ConfigError::TooLarge { path: owned() },
            NamedFileError::NotRegular { found, .. } => ConfigError::NotRegular {
                path: owned(),
                found,
            },
        })?;
        let text = String::from_utf8(bytes).map_err(|error| ConfigError::Parse {
            path: owned(),
            reason: format!(
                "not valid UTF-8 after byte {}",
                error.utf8_error().valid_up_to()
            ),
        })?;
        let parsed = toml::from_str::<Self>(&text).map_err(|e| ConfigError::Parse {
            path: owned(),
            reason: e.to_string(),
        });
        parsed.map(|file| Self { text, ..file })
    }

    /// The settings that follow, for the places in `places`.
    pub(crate) fn settings(&self, places: Places) -> Result<Settings, ConfigError> {
        let path = places.config.clone().unwrap_or_else(|| "(defaults)".into());
        let refuse = |key: &'static str, reason: String| ConfigError::Value {
            path: path.clone(),
            place: Place::of(&self.text, key),
            key,
            reason,
        };
        self.check_paths(refuse)?;
        let default_policy = Policy {
            heartbeat_timeout_s: self.defaults.heartbeat_timeout_s,
            auto_heal: self.defaults.auto_heal,
            morph_timeout_s: self.defaults.morph_timeout_s,
            vmcore: self.defaults.vmcore,
            stuck_cpu: self.defaults.stuck_cpu,
        };
        let fault = default_policy.fault();
        if let Some((key, fault)) = fault.or_else(|| unkept(self.backend.kind(), &default_policy)) {
            return Err(refuse(default_key(key), fault));
        }
        let seconds = |key, value: f64| match Duration::try_from_secs_f64(value) {
            Ok(time) if (0.1..=3600.0).contains(&value) => Ok(time),
            _ => Err(refuse(
                key,
                format!("{value} is not a number of seconds from 0.1 to 3600"),
            )),
        };
        let mib = |key, value: u64| {
            let bytes = value.checked_mul(1 << 20).filter(|_| value > 0);
            bytes.ok_or_else(|| refuse(key, format!("{value} MiB is out of range")))
        };
        if self.limits.recoveries == 0 {
            return Err(refuse("limits.recoveries", "must be at least 1".to_owned()));
        }
        let (cpus, memory) = match self.backend {
            Backend::Multikernel => self.no_pool(refuse)?,
            Backend::Embedded | Backend::Qemu => (
                self.pool_cpus(refuse)?,
                match self.pool.memory_mib {
                    Some(value) => self.pool_memory(mib("pool.memory_mib", value)?, refuse)?,
                    None => host_memory_bytes()
                        .saturating_sub(HOST_MEMORY_BYTES)
                        .max(HOST_MEMORY_BYTES),
                },
            ),
        };
        Ok(Settings {
            default_policy,
            default_memory_bytes: mib("defaults.memory_mib", self.defaults.memory_mib)?,
            start_timeout: seconds("limits.start_timeout_s", self.limits.start_timeout_s)?,
            stop_timeout: seconds("limits.stop_timeout_s", self.limits.stop_timeout_s)?,
            port_hold: seconds("limits.port_hold_s", self.limits.port_hold_s)?,
            recoveries_max: self.limits.recoveries,
            pool: Stock {
                cpus,
                // CPUs that were named are given out one by one; a pool of "whatever there is" is shared.
                cpus_shared: match self.backend {
                    Backend::Multikernel => false,
                    _ => self.pool.share_cpus.unwrap_or(self.pool.cpus.is_none()),
                },
                memory_bytes: memory,
                bookkeeping_bytes: 0,
            },
            control_group: self.control.group.clone(),
            kv_program: places.kv,
            morph_mode: match self.morph.mode {
                Mode::Auto => MorphMode::Auto,
                Mode::Rounds => MorphMode::Rounds,
            },
            morph_expiry: seconds("morph.expiry_s", self.morph.expiry_s)?,
            downtime_budget: self.morph.downtime_budget(self.backend.kind(), refuse)?,
            vmcore: self.vmcore.settings(&places.state_dir, refuse)?,
            state_dir: places.state_dir,
            run_dir: places.run_dir,
            config_path: places.config,
        })
    }

    /// The CPUs of the pool: from the configuration, or those that this process may run on.
    fn pool_cpus(
        &self,
        refuse: impl Fn(&'static str, String) -> ConfigError,
    ) -> Result<Vec<u16>, ConfigError> {
        let present = host_cpus();
        let cpus = self.pool.cpus.clone().unwrap_or_else(|| present.clone());
        if let Some(cpu) = cpus.iter().find(|cpu| !present.contains(cpu)) {
            return Err(refuse(
                "pool.cpus",
                format!("this process cannot use CPU {cpu}"),
            ));
        }
        if cpus.is_empty() {
            return Err(refuse(
                "pool.cpus",
                "the pool needs at least one CPU".to_owned(),
            ));
        }
        Ok(cpus)
    }

    /// The memory of the pool, unless it is more than there is and that was not meant.
    fn pool_memory(
        &self,
        bytes: u64,
        refuse: impl Fn(&'static str, String) -> ConfigError,
    ) -> Result<u64, ConfigError> {
        let there_is = host_memory_bytes();
        if bytes <= there_is || self.pool.share_memory {
            return Ok(bytes);
        }
        let reason = format!(
            "this machine has {} MiB; set pool.share_memory = true to allow more",
            there_is >> 20
        );
        Err(refuse("pool.memory_mib", reason))
    }

    /// Refuses paths that mean another place for each working directory. A program without any `/` is looked up in
    /// PATH.
    fn check_paths(
        &self,
        refuse: impl Fn(&'static str, String) -> ConfigError,
    ) -> Result<(), ConfigError> {
        let (paths, qemu) = (&self.paths, &self.qemu);
        let in_path = |path: &&PathBuf| path.components().count() > 1;
        let all = [
            ("paths.state_dir", paths.state_dir.as_ref()),
            ("paths.run_dir", paths.run_dir.as_ref()),
            ("paths.socket", paths.socket.as_ref()),
            ("paths.cache_dir", paths.cache_dir.as_ref()),
            ("paths.agent", paths.agent.as_ref()),
            ("paths.kv", paths.kv.as_ref()),
            ("qemu.kerf_modules", qemu.kerf_modules.as_ref()),
            ("qemu.modules", qemu.modules.as_ref()),
            ("qemu.program", qemu.program.as_ref().filter(in_path)),
            (
                "qemu.vhost_vsock",
                qemu.vhost_vsock.as_ref().filter(in_path),
            ),
            ("qemu.kerf_host", qemu.kerf_host.as_ref().filter(in_path)),
        ];
        for (key, path) in all.into_iter().chain(self.multikernel.paths()) {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                let reason = format!("{} is not an absolute path", path.display());
                return Err(refuse(key, reason));
            }
        }
        Ok(())
    }

    /// With the multikernel backend the pool is the kernel's own, which is read from it once the configuration is
    /// known to be sound.
    fn no_pool(
        &self,
        refuse: impl Fn(&'static str, String) -> ConfigError,
    ) -> Result<(Vec<u16>, u64), ConfigError> {
        if self.pool != Pool::default() {
            let reason = "with backend = \"multikernel\" the pool is the kernel's own, which kerf init makes";
            return Err(refuse("pool", reason.to_owned()));
        }
        Ok((Vec::new(), 0))
    }
}

impl Backend {
    /// The backend itself.
    pub(crate) fn kind(self) -> BackendKind {
        match self {
            Self::Embedded => BackendKind::Embedded,
            Self::Qemu => BackendKind::Qemu,
            Self::Multikernel => BackendKind::Multikernel,
        }
    }
}

/// The key of the file that the default of a policy's `key` comes from.
fn default_key(key: &str) -> &'static str {
    match key {
        "heartbeat_timeout_s" => "defaults.heartbeat_timeout_s",
        "morph_timeout_s" => "defaults.morph_timeout_s",
        "vmcore" => "defaults.vmcore",
        _ => "defaults",
    }
}

/// The directories of this daemon.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    pub(crate) config: Option<PathBuf>,
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) kv: PathBuf,
}

/// CPUs this process may run on.
fn host_cpus() -> Vec<u16> {
    let Ok(set) = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)) else {
        return vec![0];
    };
    (0..nix::sched::CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .filter_map(|cpu| u16::try_from(cpu).ok())
        .collect()
}

fn host_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests;
