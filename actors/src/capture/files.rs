//! Names and retention of capture files.
//!
//! `<dir>/<instance>/<generation>-<time>.vmcore`, and next to it the kernel's log, `.dmesg`. Files with other names
//! are never touched.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kmorph_vmcore::writer::partial_path;

use crate::model::settings::Retention;

const VMCORE: &str = "vmcore";
const LOG: &str = "dmesg";
/// Suffix of a file name while the file is incomplete.
const PARTIAL: &str = "partial";
const FILE_MODE: u32 = 0o600;

/// The location of one generation's files.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The instance's directory.
    pub(super) dir: PathBuf,
    /// The generation.
    pub(super) generation: u64,
}

/// The files of one capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Files {
    /// The dump.
    pub(super) vmcore: PathBuf,
    /// The kernel's log.
    pub(super) log: PathBuf,
}

/// A capture in an instance's directory.
struct Found {
    generation: u64,
    /// `<generation>-<time>`.
    stem: String,
    vmcore: Option<(u64, SystemTime)>,
}

impl Place {
    /// Returns the files of a capture at `time`, RFC 3339.
    pub(super) fn files(&self, time: &str) -> Files {
        let time: String = time.chars().filter(char::is_ascii_alphanumeric).collect();
        self.named(&format!("{}-{time}", self.generation))
    }

    fn named(&self, stem: &str) -> Files {
        Files {
            vmcore: self.dir.join(format!("{stem}.{VMCORE}")),
            log: self.dir.join(format!("{stem}.{LOG}")),
        }
    }

    /// Returns the complete vmcore of this generation with its log, if any, and its length.
    pub(super) fn complete(&self) -> Option<(Files, u64)> {
        let found = self.found().into_iter();
        let own = found.filter(|found| found.generation == self.generation);
        own.filter_map(|found| {
            let (bytes, _) = found.vmcore?;
            Some((self.named(&found.stem), bytes))
        })
        .next_back()
    }

    /// Removes the files that the rule does not keep. A failed removal does not affect the new vmcore.
    pub(super) fn prune(&self, rule: &Retention) {
        let (mut kept, mut bytes) = (0, 0u64);
        for found in self.found().into_iter().rev() {
            let (length, made) = found.vmcore.unwrap_or((0, SystemTime::UNIX_EPOCH));
            bytes = bytes.saturating_add(length);
            #[expect(
                clippy::disallowed_methods,
                reason = "the system gave the file its time"
            )]
            let age = made.elapsed().unwrap_or_default();
            let stays = kept == 0
                || kept < rule.count
                    && rule.age.is_none_or(|most| age <= most)
                    && rule.bytes.is_none_or(|most| bytes <= most);
            if stays && found.vmcore.is_some() {
                kept += 1;
            } else {
                self.remove(&found.stem);
            }
        }
    }

    /// Removes the partial files of failed captures, to make room for the next one.
    pub(super) fn remove_partial(&self) {
        for found in self.found() {
            let files = self.named(&found.stem);
            let _ = std::fs::remove_file(partial_path(&files.vmcore));
            let _ = std::fs::remove_file(partial_path(&files.log));
        }
    }

    fn remove(&self, stem: &str) {
        let Files { vmcore, log } = self.named(stem);
        for path in [&vmcore, &log] {
            let _ = std::fs::remove_file(path);
            let _ = std::fs::remove_file(partial_path(path));
        }
    }

    /// Returns the captures in the directory, oldest first.
    fn found(&self) -> Vec<Found> {
        let mut all: std::collections::BTreeMap<(u64, String), Option<(u64, SystemTime)>> =
            std::collections::BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some((stem, end)) = name.to_str().and_then(|name| name.split_once('.')) else {
                continue;
            };
            let Some(generation) = generation_of(stem) else {
                continue;
            };
            let whole = end
                .strip_suffix(PARTIAL)
                .and_then(|end| end.strip_suffix('.'));
            let partial = matches!(whole, Some(VMCORE | LOG));
            if end != VMCORE && end != LOG && !partial {
                continue;
            }
            let found = all.entry((generation, stem.to_owned())).or_default();
            if end == VMCORE
                && let Ok(meta) = entry.metadata()
            {
                *found = Some((
                    meta.len(),
                    meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                ));
            }
        }
        let found = all.into_iter().map(|((generation, stem), vmcore)| Found {
            generation,
            stem,
            vmcore,
        });
        found.collect()
    }
}

fn generation_of(stem: &str) -> Option<u64> {
    let (generation, time) = stem.split_once('-')?;
    let sound = !time.is_empty() && time.bytes().all(|b| b.is_ascii_alphanumeric());
    generation.parse().ok().filter(|_| sound)
}

impl Files {
    /// Writes the log atomically.
    pub(super) fn save_log(&self, text: &[u8]) -> io::Result<()> {
        let partial = partial_path(&self.log);
        let written = write_new(&partial, text).and_then(|()| std::fs::rename(&partial, &self.log));
        if written.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        written
    }
}

fn write_new(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const RULE: Retention = Retention {
        count: 2,
        age: None,
        bytes: None,
    };

    fn place(dir: &tempfile::TempDir, generation: u64) -> Place {
        Place {
            dir: dir.path().to_owned(),
            generation,
        }
    }

    fn put(dir: &tempfile::TempDir, generation: u64, bytes: usize) -> Files {
        let files = place(dir, generation).files("2026-11-25T20:00:00.000Z");
        std::fs::write(&files.vmcore, vec![0; bytes]).unwrap();
        files.save_log(b"[    0.000000] Linux").unwrap();
        files
    }

    #[test]
    fn a_complete_vmcore_is_found_and_a_partial_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(place(&dir, 7).complete().is_none());
        for end in ["vmcore.partial", "dmesg.partial"] {
            let partial = dir.path().join(format!("7-20261125T200000000Z.{end}"));
            std::fs::write(partial, "").unwrap();
        }
        assert!(place(&dir, 7).complete().is_none());
        place(&dir, 8).remove_partial();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let files = put(&dir, 7, 5);
        assert_eq!(place(&dir, 7).complete(), Some((files, 5)));
        assert!(place(&dir, 70).complete().is_none());
    }

    #[test]
    fn older_ones_give_way_by_count_and_bytes_and_strangers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<_> = [2, 9, 10, 11].map(|n| put(&dir, n, 100)).into();
        let stranger = dir.path().join("notes.txt");
        std::fs::write(&stranger, "").unwrap();
        place(&dir, 11).prune(&RULE);
        let left: Vec<bool> = all.iter().map(|files| files.vmcore.exists()).collect();
        assert_eq!(left, [false, false, true, true]);
        assert!(!all[0].log.exists() && all[3].log.exists() && stranger.exists());
        let small = Retention {
            bytes: Some(50),
            ..RULE
        };
        place(&dir, 11).prune(&small);
        assert!(!all[2].vmcore.exists());
        assert!(
            all[3].vmcore.exists(),
            "the newest stays, whatever its length"
        );
    }

    #[test]
    fn older_ones_give_way_by_age() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (put(&dir, 1, 1), put(&dir, 2, 1));
        #[expect(clippy::disallowed_methods, reason = "the time of a file")]
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        let file = std::fs::File::options()
            .write(true)
            .open(&old.vmcore)
            .unwrap();
        file.set_modified(long_ago).unwrap();
        let rule = Retention {
            age: Some(Duration::from_secs(60)),
            ..RULE
        };
        place(&dir, 2).prune(&rule);
        assert!(!old.vmcore.exists() && new.vmcore.exists());
    }
}
