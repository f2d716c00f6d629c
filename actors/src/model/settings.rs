//! What the configuration decides at run time.

use std::path::PathBuf;
use std::time::Duration;

use crate::model::Policy;

use kmorph_vmcore::paced::Rate;
use kmorph_vmcore::writer::Output;

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

/// What a pool has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stock {
    /// Host CPUs.
    pub cpus: Vec<u16>,
    /// Several generations may be given the same CPU, and the least loaded ones are given first.
    pub cpus_shared: bool,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// What each generation takes of the memory besides its own, bytes.
    pub bookkeeping_bytes: u64,
}

/// How memory is captured.
#[derive(Clone, Debug, PartialEq)]
pub struct VmcoreSettings {
    /// Where vmcores go: a directory for each instance below it.
    pub dir: PathBuf,
    /// Kinds of pages that are left out, 0 to 31, as makedumpfile's `-d`.
    pub level: u32,
    /// The format.
    pub output: Output,
    /// Threads that read and pack.
    pub threads: usize,
    /// How fast memory is read; as fast as it goes without.
    pub rate: Option<Rate>,
    /// How many survivors may help to read it, 0 to [`SURVIVORS_MAX`](crate::capture::SURVIVORS_MAX).
    pub survivors: usize,
    /// Which older ones are kept.
    pub retention: Retention,
}

/// Which vmcores of an instance stay when there is a new one. The newest always does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How many, at least 1.
    pub count: usize,
    /// How old, if that matters.
    pub age: Option<Duration>,
    /// How many bytes in all, if that matters.
    pub bytes: Option<u64>,
}
