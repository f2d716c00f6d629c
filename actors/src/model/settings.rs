//! Settings from the configuration that are used at run time.

use std::path::PathBuf;
use std::time::Duration;

use crate::model::Policy;

use kmorph_vmcore::paced::Rate;
use kmorph_vmcore::writer::Output;

/// Settings that a reload may change, and paths that it may not.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Default policy of new instances.
    pub default_policy: Policy,
    /// Default memory of new instances, bytes.
    pub default_memory_bytes: u64,
    /// Maximum time until a new instance's first healthy answer.
    pub start_timeout: Duration,
    /// Maximum time for a clean shutdown when an instance is terminated.
    pub stop_timeout: Duration,
    /// How long connections to the published ports of a failed instance wait for the successor.
    pub port_hold: Duration,
    /// Maximum number of concurrent recoveries.
    pub recoveries_max: usize,
    /// CPUs and memory of the pool.
    pub pool: Stock,
    /// Group whose users may change things, in addition to root and the daemon's user.
    pub control_group: Option<String>,
    /// Path of `kmorph-kv`, for instances that name the program without a path.
    pub kv_program: PathBuf,
    /// Maximum time that a validated morph waits for its commit, and a prepared morph for its validation.
    pub morph_expiry: Duration,
    /// Default downtime budget of a morph.
    pub downtime_budget: Duration,
    /// How a morph transfers state.
    pub morph_mode: MorphMode,
    /// How the memory of a failed instance is captured.
    pub vmcore: VmcoreSettings,
    /// State directory.
    pub state_dir: PathBuf,
    /// Runtime directory.
    pub run_dir: PathBuf,
    /// Configuration file, if one was read.
    pub config_path: Option<PathBuf>,
}

/// How a morph transfers state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MorphMode {
    /// By reference if both sides can map the same memory, otherwise in rounds.
    #[default]
    Auto,
    /// Always in rounds; established connections do not move.
    Rounds,
}

/// CPUs and memory of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stock {
    /// Host CPUs.
    pub cpus: Vec<u16>,
    /// Several generations may share a CPU; the least loaded CPUs are allocated first.
    pub cpus_shared: bool,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Memory that each generation uses in addition to its own, for bookkeeping, bytes.
    pub bookkeeping_bytes: u64,
}

/// How memory is captured.
#[derive(Clone, Debug, PartialEq)]
pub struct VmcoreSettings {
    /// Directory for vmcores, with a subdirectory for each instance.
    pub dir: PathBuf,
    /// Page types to leave out, 0 to 31, as makedumpfile's `-d`.
    pub level: u32,
    /// The file format.
    pub output: Output,
    /// Threads that read and compress.
    pub threads: usize,
    /// Maximum read rate; unlimited if absent.
    pub rate: Option<Rate>,
    /// Maximum number of survivors that help to read memory, 0 to [`SURVIVORS_MAX`](crate::capture::SURVIVORS_MAX).
    pub survivors: usize,
    /// Which older vmcores are kept.
    pub retention: Retention,
}

/// Which vmcores of an instance are kept when a new one is written. The newest one always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Maximum number of files, at least 1.
    pub count: usize,
    /// Maximum age; unlimited if absent.
    pub age: Option<Duration>,
    /// Maximum total size, bytes; unlimited if absent.
    pub bytes: Option<u64>,
}
