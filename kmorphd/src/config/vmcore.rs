//! `[vmcore]`: how memory is captured, and how long vmcores are kept.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kmorph_actors::capture::SURVIVORS_MAX;
use kmorph_actors::model::settings::{Retention, VmcoreSettings};
use kmorph_vmcore::compression::Compression;
use kmorph_vmcore::paced::{RATE_MAX_MIB_S, RATE_MIN_MIB_S, Rate};
use kmorph_vmcore::writer::{LEVEL_MAX, Output, THREADS_MAX};
use serde::{Deserialize, Serialize};

use super::ConfigError;

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Vmcore {
    dir: Option<PathBuf>,
    level: u32,
    format: DumpFormat,
    threads: usize,
    rate_mib_s: Option<u64>,
    survivors: usize,
    keep: usize,
    keep_days: Option<u64>,
    keep_mib: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum DumpFormat {
    #[default]
    Zstd,
    Lzo,
    Zlib,
    Elf,
}

impl Default for Vmcore {
    fn default() -> Self {
        Self {
            dir: None,
            level: LEVEL_MAX,
            format: DumpFormat::default(),
            // More would take CPUs from the instances that live.
            threads: 1,
            rate_mib_s: None,
            // What is lent to a survivor is all that the failed kernel knew.
            survivors: 0,
            keep: 5,
            keep_days: None,
            keep_mib: None,
        }
    }
}

impl Vmcore {
    /// The settings for captures.
    pub(super) fn settings(
        &self,
        state_dir: &Path,
        refuse: impl Fn(&'static str, String) -> ConfigError,
    ) -> Result<VmcoreSettings, ConfigError> {
        let dir = self.dir.clone().unwrap_or_else(|| state_dir.join("vmcore"));
        if !dir.is_absolute() {
            let reason = format!("{} is not an absolute path", dir.display());
            return Err(refuse("vmcore.dir", reason));
        }
        if self.level > LEVEL_MAX {
            let reason = format!("{} is not from 0 to {LEVEL_MAX}", self.level);
            return Err(refuse("vmcore.level", reason));
        }
        if !(1..=THREADS_MAX).contains(&self.threads) {
            let reason = format!("{} is not from 1 to {THREADS_MAX}", self.threads);
            return Err(refuse("vmcore.threads", reason));
        }
        let rate = match self.rate_mib_s {
            None => None,
            Some(mib_s) => Some(Rate::mib_per_second(mib_s).ok_or_else(|| {
                let reason = format!("{mib_s} is not from {RATE_MIN_MIB_S} to {RATE_MAX_MIB_S}");
                refuse("vmcore.rate_mib_s", reason)
            })?),
        };
        if self.survivors > SURVIVORS_MAX {
            let reason = format!("{} is not from 0 to {SURVIVORS_MAX}", self.survivors);
            return Err(refuse("vmcore.survivors", reason));
        }
        if self.keep == 0 {
            return Err(refuse("vmcore.keep", "must be at least 1".to_owned()));
        }
        let output = match self.format {
            DumpFormat::Zstd => Output::Kdump(Compression::Zstd),
            DumpFormat::Lzo => Output::Kdump(Compression::Lzo),
            DumpFormat::Zlib => Output::Kdump(Compression::Zlib),
            DumpFormat::Elf => Output::Elf,
        };
        let days = |days: u64| Duration::from_secs(days.saturating_mul(24 * 3600));
        Ok(VmcoreSettings {
            dir,
            level: self.level,
            output,
            threads: self.threads,
            rate,
            survivors: self.survivors,
            retention: Retention {
                count: self.keep,
                age: self.keep_days.map(days),
                bytes: self.keep_mib.map(|mib| mib.saturating_mul(1 << 20)),
            },
        })
    }
}
