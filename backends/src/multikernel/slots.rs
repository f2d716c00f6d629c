//! Kernel instances by name, and the generation that each of them holds.
//!
//! A kmorph instance `web` has two kernel instances, because two kernels run side by side during a morph: `web`, the
//! name that users of kerf see, and `web+b`. Names of kmorph instances cannot contain `+`, so the second name is
//! never taken.
//!
//! A mark in kerf's record names the generation of a kernel instance, under a key that kerf preserves and ignores.
//! kmorph writes it before it loads anything, so that a later daemon finds what a dead daemon had started. If a user
//! loads another kernel there with kerf, kerf writes a new record: that kernel does not belong to kmorph.
//!
//! A record proves nothing by itself. It survives a reboot of the host, and the kernel instance it was written for: a
//! mark counts only in the boot in which it was written, and for the kernel instance whose [`Origin`] it names. The
//! kernel keeps the overlay that created each kernel instance, and kmorph's overlays carry a unique note.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kmorph_launch::InstanceName;
use libkerf::kernel::{Calls, Creation, Kernel, KernelError};
use libkerf::model::Instance;
use libkerf::overlay::Status;
use libkerf::record::{Record, RecordError, Records};
use serde::{Deserialize, Serialize};

use crate::contract::{KernelInstance, Placement};

/// Suffix for the name of an instance's second kernel instance.
const SECOND: &str = "+b";
/// kmorph's key in kerf's records.
const KEY: &str = "kmorph";

/// kmorph's entry in kerf's record of a kernel instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    /// The kmorph instance.
    pub(super) instance: InstanceName,
    /// The generation in the kernel instance.
    pub(super) generation: u64,
    /// Its run directory: another daemon may have an instance with this name.
    pub(super) run_dir: PathBuf,
    /// Boot id of the host at the time of the mark.
    pub(super) host_boot_id: String,
    /// The creator of the kernel instance. Only a kernel instance that kmorph created is removed together with the
    /// generation.
    #[serde(default)]
    pub(super) origin: Origin,
    /// True if its fence was confirmed: it no longer runs, whatever the status file says.
    #[serde(default)]
    pub(super) fenced: bool,
}

/// The creation of a kernel instance: names and ids are reused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Origin {
    /// The mark is from a version of kmorph that did not record the creation: kmorph must not remove the instance.
    #[default]
    Unknown,
    /// kmorph has created it, or was about to, with an overlay with this note.
    Ours(String),
    /// Another program has created it, in this transaction; `None` if the kernel's transactions do not tell.
    Theirs(Option<u64>),
}

impl Origin {
    /// Creates a unique origin for a kernel instance that is created now, for this generation.
    pub(super) fn new(instance: &InstanceName, generation: u64) -> std::io::Result<Self> {
        let nonce = getrandom::u64().map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(Self::Ours(format!(
            "kmorph {instance} generation {generation} {nonce:016x}"
        )))
    }

    /// Returns whether the kernel instance with this creation has this origin; `None` if the kernel does not tell.
    fn is(&self, creation: Option<Creation>) -> Option<bool> {
        match self {
            Self::Unknown | Self::Theirs(None) => Some(true),
            Self::Ours(note) => creation.map(|made| made.note.as_ref() == Some(note)),
            Self::Theirs(Some(number)) => creation.map(|made| made.transaction == *number),
        }
    }

    pub(super) fn is_ours(&self) -> bool {
        matches!(self, Self::Ours(_))
    }
}

impl Mark {
    /// Returns the mark in a record; `None` if it is missing or not understood.
    pub(super) fn of(record: &Record) -> Option<Self> {
        serde_json::from_value(record.other.get(KEY)?.clone()).ok()
    }

    /// Returns whether the mark names this generation with this run directory.
    pub(super) fn is_of(&self, generation: u64, run_dir: &Path) -> bool {
        self.generation == generation && self.run_dir == run_dir
    }

    /// Adds the mark to a record.
    pub(super) fn put(&self, record: &mut Record) {
        // The mark's fields are text and numbers, which always serialize.
        if let Ok(value) = serde_json::to_value(self) {
            record.other.insert(KEY.to_owned(), value);
        }
    }
}

/// The content of a kernel instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The kernel instance does not exist.
    Absent,
    /// A kernel instance into which kmorph has loaded no kernel.
    Foreign(Status),
    /// A generation of kmorph.
    Marked(Mark, Status),
    /// Another program has created this kernel instance after kmorph's was gone; the record still has kmorph's mark.
    /// Its generation has ended: the kernel removes only instances without a running kernel.
    Outlived(Mark, Status),
}

/// How a placement's kernel instance relates to its generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// The kernel instance no longer exists.
    Gone,
    /// It holds a later generation: this one was fenced before the later one was loaded.
    Another,
    /// Its record no longer has kmorph's mark.
    Foreign(Status),
    /// It holds the generation.
    This(Mark, Status),
}

/// The result of tidying up a leftover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tidied {
    /// A stale lock of kmorph was removed.
    Unlocked,
    /// The lock could not be examined, with the reason.
    StillLocked(String),
    /// A record was removed.
    Removed(String),
    /// A record could not be examined, with the reason.
    Kept(String, String),
}

impl std::fmt::Display for Tidied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unlocked => f.write_str("removed kerf's lock: a kmorphd that held it was killed"),
            Self::StillLocked(why) => write!(f, "left kerf's lock: {why}"),
            Self::Removed(name) => write!(
                f,
                "removed the record of kernel instance {name:?}: its generation is gone"
            ),
            Self::Kept(name, why) => {
                write!(f, "left the record of kernel instance {name:?}: {why}")
            }
        }
    }
}

/// Why a query of the kernel or of kerf's records failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SlotError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The kernel's transactions do not contain the creation of the kernel instance.
    #[error(
        "the kernel's transactions do not show who created kernel instance {0:?}, and a kernel is loaded there; when \
         it is no longer running, remove it with kerf delete {0}"
    )]
    Untold(String),
}

/// The host's kernel, kerf's records, and the calls that load and boot.
pub(super) struct Slots {
    pub(super) kernel: Kernel,
    pub(super) records: Records,
    pub(super) calls: Box<dyn Calls + Send + Sync>,
    pub(super) host_boot_id: String,
    /// Serializes this daemon's changes: each is planned on the result of the previous one.
    changes: Mutex<()>,
}

impl Slots {
    pub(super) fn new(
        kernel: Kernel,
        records: Records,
        calls: Box<dyn Calls + Send + Sync>,
        host_boot_id: String,
    ) -> Self {
        let changes = Mutex::new(());
        Self {
            kernel,
            records,
            calls,
            host_boot_id,
            changes,
        }
    }

    /// Returns the kernel instances of a kmorph instance.
    pub(super) fn names(name: &InstanceName) -> [String; 2] {
        [name.to_string(), format!("{name}{SECOND}")]
    }

    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the content of the kernel instance with this name.
    pub(super) fn content(&self, name: &str) -> Result<Content, SlotError> {
        let (mark, status) = match self.recorded(name)? {
            Content::Marked(mark, status) => (mark, status),
            content => return Ok(content),
        };
        match mark.origin.is(self.kernel.creation(name)?) {
            Some(true) => Ok(Content::Marked(mark, status)),
            // An unknown creation does not prove that kmorph's generation has ended.
            None if status.has_kernel() => Err(SlotError::Untold(name.to_owned())),
            Some(false) | None => Ok(Content::Outlived(mark, status)),
        }
    }

    /// Returns whether the mark was made for the kernel instance that has this name now.
    pub(super) fn is_of(&self, name: &str, mark: &Mark) -> Result<bool, KernelError> {
        Ok(mark.origin.is(self.kernel.creation(name)?) == Some(true))
    }

    /// Returns the content according to the record of the kernel instance with this name. Cheap: does not check
    /// whether the record belongs to that kernel instance, which would require the kernel's transactions.
    fn recorded(&self, name: &str) -> Result<Content, SlotError> {
        let status = match self.kernel.status(name) {
            Ok(status) => status,
            Err(error) if is_absent(&error) => {
                // If the files are not mounted, all instances appear absent although they may run: this call then
                // fails.
                self.kernel.instance_names()?;
                return Ok(Content::Absent);
            }
            Err(error) => return Err(error.into()),
        };
        let record = self.records.load(name)?;
        let mark = record.as_ref().and_then(Mark::of);
        Ok(
            match mark.filter(|mark| mark.host_boot_id == self.host_boot_id) {
                Some(mark) => Content::Marked(mark, status),
                None => Content::Foreign(status),
            },
        )
    }

    /// Returns whether a placement's kernel instance still holds the generation.
    pub(super) fn holds(&self, placement: &Placement) -> Result<Holds, SlotError> {
        self.related(placement, &Self::content)
    }

    /// As [`Slots::holds`], but only from the record, for frequent checks: the result must not lead to an action on
    /// the kernel instance.
    pub(super) fn seems_to_hold(&self, placement: &Placement) -> Result<Holds, SlotError> {
        self.related(placement, &Self::recorded)
    }

    fn related(
        &self,
        placement: &Placement,
        content: &dyn Fn(&Self, &str) -> Result<Content, SlotError>,
    ) -> Result<Holds, SlotError> {
        let Some(KernelInstance { name, id }) = &placement.kernel_instance else {
            return Ok(Holds::Gone);
        };
        let content = content(self, name)?;
        if content != Content::Absent && self.kernel.id(name)? != *id {
            return Ok(Holds::Gone);
        }
        Ok(match content {
            Content::Absent | Content::Outlived(..) => Holds::Gone,
            Content::Foreign(status) => Holds::Foreign(status),
            Content::Marked(mark, status) => {
                match mark.is_of(placement.generation, &placement.run_dir) {
                    true => Holds::This(mark, status),
                    false => Holds::Another,
                }
            }
        })
    }

    /// Removes the record of a kernel instance that no longer exists, if it belongs to this generation.
    pub(super) fn forget(&self, placement: &Placement) -> Result<(), RecordError> {
        let Some(KernelInstance { name, .. }) = &placement.kernel_instance else {
            return Ok(());
        };
        self.forget_of(name, placement.generation, &placement.run_dir)
    }

    /// Removes the record of a kernel instance if it has the mark of this generation.
    pub(super) fn forget_of(
        &self,
        name: &str,
        generation: u64,
        run_dir: &Path,
    ) -> Result<(), RecordError> {
        let mark = self.records.load(name)?.as_ref().and_then(Mark::of);
        match mark.filter(|mark| mark.is_of(generation, run_dir)) {
            Some(_) => self.records.remove(name),
            None => Ok(()),
        }
    }

    /// Removes leftovers: kerf's lock if a daemon was killed while it held it; records from earlier boots, by any
    /// writer; and records of generations below `run_dir` whose kernel instance no longer exists. Call this while no
    /// generation is being started. Unreadable records stay, with a reason.
    pub(super) fn tidy(&self, run_dir: &Path) -> Result<Vec<Tidied>, SlotError> {
        let mut done = Vec::new();
        match self.kernel.remove_left_lock() {
            Ok(true) => done.push(Tidied::Unlocked),
            Ok(false) => {}
            Err(error) => done.push(Tidied::StillLocked(error.to_string())),
        }
        for name in self.records.names()? {
            match self.outlived(&name, run_dir) {
                Ok(false) => {}
                Ok(true) => {
                    self.records.remove(&name)?;
                    done.push(Tidied::Removed(name));
                }
                Err(error) => done.push(Tidied::Kept(name, error.to_string())),
            }
        }
        Ok(done)
    }

    /// Returns the kernel instances other than those of these generations (instance and number) below `run_dir`:
    /// those of kerf, of other daemons, and unknown leftovers of kmorph.
    pub(super) fn held_besides(
        &self,
        run_dir: &Path,
        counted: &[(String, u64)],
    ) -> Result<Vec<Instance>, SlotError> {
        let mut besides = Vec::new();
        for instance in self.kernel.state(None)?.system.instances {
            // An unreadable record does not count as one of these generations.
            let record = self.records.load(&instance.name).ok().flatten();
            let is_counted = record.as_ref().and_then(Mark::of).is_some_and(|mark| {
                let generations = counted.iter();
                let mut named =
                    generations.filter(|(_, generation)| *generation == mark.generation);
                mark.host_boot_id == self.host_boot_id
                    && mark.run_dir.starts_with(run_dir)
                    && named.any(|(name, _)| *name == mark.instance.as_str())
            });
            if !is_counted {
                besides.push(instance);
            }
        }
        Ok(besides)
    }

    fn outlived(&self, name: &str, run_dir: &Path) -> Result<bool, SlotError> {
        let Some(mark) = self.records.load(name)?.as_ref().and_then(Mark::of) else {
            return Ok(false);
        };
        if mark.host_boot_id != self.host_boot_id {
            return Ok(true);
        }
        Ok(mark.run_dir.starts_with(run_dir)
            && matches!(self.content(name)?, Content::Absent | Content::Outlived(..)))
    }

    /// Writes the mark of a generation that is about to enter an empty kernel instance. Keeps other contents of the
    /// record.
    pub(super) fn begin(&self, name: &str, mark: &Mark) -> Result<(), RecordError> {
        let mut record = self.records.load(name)?.unwrap_or_default();
        // Images from an earlier boot, or of an earlier generation, are not loaded now.
        (record.kernel, record.initrd) = (None, None);
        (record.rootfs, record.loaded_at) = (None, None);
        mark.put(&mut record);
        self.records.save(name, &record)
    }

    /// Writes a mark into the record of a kernel instance. Keeps other contents of the record.
    pub(super) fn mark(&self, name: &str, mark: &Mark) -> Result<(), RecordError> {
        let mut record = self.records.load(name)?.unwrap_or_default();
        mark.put(&mut record);
        self.records.save(name, &record)
    }
}

pub(super) fn is_absent(error: &KernelError) -> bool {
    matches!(error, KernelError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_name_is_one_that_no_instance_can_have() {
        let web: InstanceName = "web".parse().unwrap();
        let [first, second] = Slots::names(&web);
        assert_eq!((first.as_str(), second.as_str()), ("web", "web+b"));
        assert!(second.parse::<InstanceName>().is_err());
    }

    #[test]
    fn a_mark_lies_beside_what_else_is_in_a_record() {
        let text = r#"{"kernel": null, "later": 1, "loaded_at": "now"}"#;
        let mut record: Record = serde_json::from_str(text).unwrap();
        assert_eq!(Mark::of(&record), None);
        let mark = Mark {
            instance: "web".parse().unwrap(),
            generation: 7,
            run_dir: "/run/web/7".into(),
            host_boot_id: "b".to_owned(),
            origin: Origin::Ours("kmorph web generation 7 0".to_owned()),
            fenced: false,
        };
        mark.put(&mut record);
        assert_eq!(Mark::of(&record), Some(mark));
        assert_eq!(record.other["later"], 1);
        record.other.insert(KEY.to_owned(), "what?".into());
        assert_eq!(Mark::of(&record), None);
    }
}
