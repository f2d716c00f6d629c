//! Instance records: the loaded files of an instance, in kerf's format and place.
//!
//! The kernel knows segments, not files; kerf records and shows the origin of an image. kerf can read
//! the records of this module, and the module keeps contents that kerf or a later version added.

mod definition;
mod image;

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

pub(crate) use image::read as read_image;

use crate::dts::{DtsError, Unprintable};

/// Directory of kerf's records.
pub const DIRECTORY: &str = "/var/lib/kerf/instances";

/// Maximum size of a record, in bytes.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// The record of an instance's loaded files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The kernel image.
    #[serde(default)]
    pub kernel: Option<Image>,
    /// The initial file system; older records contain only its path.
    #[serde(default)]
    pub initrd: Option<Initrd>,
    /// The root file system, as kerf describes it.
    #[serde(default)]
    pub rootfs: Option<Value>,
    /// Time of the load: ISO 8601, UTC.
    #[serde(default)]
    pub loaded_at: Option<String>,
    /// All other contents of the record.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Record {
    /// Sets the time of the load to now, in seconds, as kerf does.
    pub fn loaded_now(&mut self) {
        let now = jiff::Timestamp::now();
        self.loaded_at = Some(now.strftime("%Y-%m-%dT%H:%M:%S+00:00").to_string());
    }
}

/// An image file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Path from which it was read.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// `bzImage`, `vmlinux` or `unknown`; absent for an initial file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Its compression format.
    pub compression: Option<String>,
    /// The kernel's version; absent for an initial file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// An initial file system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Initrd {
    /// The record of the file.
    Image(Image),
    /// Its path, as older versions of kerf wrote it.
    Path(String),
}

/// Why a record cannot be used.
#[derive(Debug, Error)]
pub enum RecordError {
    /// An instance's name is not a valid file name.
    #[error("{0:?} cannot name a file")]
    Name(String),
    /// The file cannot be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// The attempted action.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is not a record.
    #[error(
        "{} is not an instance record: {source}; it records what is loaded in the instance, for kerf show: move it away, and \
         load the instance's kernel again if it has one",
        path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// The error in it.
        source: serde_json::Error,
    },
    /// The file does not contain a device tree.
    #[error("{}: {source}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// The error in it.
        source: DtsError,
    },
    /// The tree has a name that source text cannot express.
    #[error("{}: {source}", path.display())]
    Unprintable {
        /// The file.
        path: PathBuf,
        /// The name.
        source: Unprintable,
    },
}

/// The records in a directory.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
}

impl Default for Records {
    fn default() -> Self {
        Self::in_directory(DIRECTORY)
    }
}

impl Records {
    /// Returns the records in this directory.
    #[must_use]
    pub fn in_directory(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// Returns an instance's record; `None` if nothing was loaded.
    ///
    /// # Errors
    ///
    /// If it exists but cannot be read. kerf ignores such a record.
    pub fn load(&self, name: &str) -> Result<Option<Record>, RecordError> {
        let path = self.path(name, "json")?;
        let failed = io_error("reading", &path);
        let length = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        if length > MAX_RECORD_BYTES {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        let record = serde_json::from_str(&text);
        record
            .map(Some)
            .map_err(|source| RecordError::Content { path, source })
    }

    /// Writes an instance's record atomically.
    ///
    /// # Errors
    ///
    /// If it cannot be written; the previous file then still exists.
    pub fn save(&self, name: &str, record: &Record) -> Result<(), RecordError> {
        let path = self.path(name, "json")?;
        let text = serde_json::to_string_pretty(record).map_err(|source| RecordError::Content {
            path: path.clone(),
            source,
        })?;
        // kerf uses the same temporary name, so that neither leaves the other's file behind.
        self.write(&path, "tmp", text.as_bytes())
    }

    /// Writes a file atomically. Until it is complete it has the extension `unfinished`.
    fn write(&self, path: &Path, unfinished: &str, bytes: &[u8]) -> Result<(), RecordError> {
        let unfinished = path.with_extension(unfinished);
        let write = || {
            fs::create_dir_all(&self.directory)?;
            let mut file = fs::File::create(&unfinished)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&unfinished, path)?;
            fs::File::open(&self.directory)?.sync_all()
        };
        write().map_err(|error| {
            // On a full disk, the partial file would take space that is needed.
            let _ = fs::remove_file(&unfinished);
            io_error("writing", path)(error)
        })
    }

    /// Returns the names of all instances that have a record, sorted.
    ///
    /// # Errors
    ///
    /// If the directory cannot be read. A missing directory is not an error.
    pub fn names(&self) -> Result<Vec<String>, RecordError> {
        let failed = io_error("reading", &self.directory);
        let read = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.directory)? {
                let name = entry?.file_name();
                let name = name.to_str().and_then(|name| name.strip_suffix(".json"));
                names.extend(name.map(str::to_owned));
            }
            Ok(names)
        };
        let mut names = match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => other.map_err(failed)?,
        };
        names.sort();
        Ok(names)
    }

    /// Removes an instance's record. A missing record is not an error.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), RecordError> {
        let path = self.path(name, "json")?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("removing", &path)(error))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, name: &str, extension: &str) -> Result<PathBuf, RecordError> {
        let is_name = !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']);
        if !is_name {
            return Err(RecordError::Name(name.to_owned()));
        }
        Ok(self.directory.join(format!("{name}.{extension}")))
    }
}

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> RecordError + use<'a> {
    move |source| RecordError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::in_directory(directory.path());
        let text = r#"{
  "kernel": {"path": "/boot/a", "size": 5, "sha256": "ab", "format": "bzImage", "compression": "zstd", "version": "6.12"},
  "initrd": "/boot/initrd",
  "rootfs": {"source": "docker", "image": "x"},
  "loaded_at": "2026-01-02T03:04:05+00:00",
  "from-the-future": [1, 2]
}"#;
        fs::write(directory.path().join("web.json"), text).unwrap();
        let record = records.load("web").unwrap().unwrap();
        assert_eq!(record.initrd, Some(Initrd::Path("/boot/initrd".to_owned())));
        records.save("copy", &record).unwrap();
        let copy = fs::read_to_string(directory.path().join("copy.json")).unwrap();
        let values = |text| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(values(&copy), values(text));
        assert!(records.load("none").unwrap().is_none());
        records.remove("web").unwrap();
        records.remove("web").unwrap();
        assert!(records.load("web").unwrap().is_none());
    }

    #[test]
    fn a_name_cannot_leave_the_directory() {
        let records = Records::in_directory("/nowhere");
        for name in ["", "..", "a/b", "/etc/passwd"] {
            assert!(
                matches!(records.load(name), Err(RecordError::Name(_))),
                "{name}"
            );
        }
    }

    #[test]
    fn a_broken_record_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("web.json"), "{").unwrap();
        let error = Records::in_directory(directory.path())
            .load("web")
            .unwrap_err();
        let said = error.to_string();
        assert!(said.contains("web.json"), "{said}");
        assert!(said.contains("move it away"), "{said}");
    }

    #[test]
    fn a_record_that_cannot_be_written_leaves_nothing_unfinished() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::in_directory(directory.path());
        // The last step fails, as an earlier one does on a full disk.
        fs::create_dir_all(directory.path().join("web.json/not-empty")).unwrap();
        records.save("web", &Record::default()).unwrap_err();
        let left = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 1, "only what was there");
    }
}
