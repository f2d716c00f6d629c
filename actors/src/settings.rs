//! What the configuration decides at run time.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_control_api::Policy;

use crate::pool::Stock;
use crate::vmcore::VmcoreSettings;

/// Settings that a reload may change, and the paths that it may not.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Policy of an instance that was spawned without one.
    pub default_policy: Policy,
    /// Memory of an instance that was spawned without one, bytes.
    pub default_memory_bytes: u64,
    /// Time an instance has for its first healthy answer.
    pub start_timeout: Duration,
    /// Time an instance has to end by itself when it is terminated.
    pub stop_timeout: Duration,
    /// Time for which connections to the published ports of a failed instance wait for its successor.
    pub port_hold: Duration,
    /// Recoveries that may run at once.
    pub recoveries_max: usize,
    /// What the pool has.
    pub pool: Stock,
    /// Users of this group may change things, besides root and the daemon's own user.
    pub control_group: Option<String>,
    /// Where `kmorph-kv` lies for instances that name it without a path.
    pub kv_program: PathBuf,
    /// Longest wait of a validated morph for its commit, and of a prepared one for its validation.
    pub morph_expiry: Duration,
    /// Budget for the downtime of a morph that is begun without one.
    pub downtime_budget: Duration,
    /// How the state of a morph moves.
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

/// How the state of a morph moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MorphMode {
    /// By reference where both sides can map the same memory, else in rounds.
    #[default]
    Auto,
    /// Always in rounds; established connections do not move then.
    Rounds,
}
