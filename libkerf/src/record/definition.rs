//! Definitions: the tree from which an instance was created, `NAME.dts` next to kerf's record of the
//! instance. kerf itself stores none.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::PathBuf;

use super::{RecordError, Records, io_error};
use crate::dts::{self, MAX_TEXT_BYTES};
use crate::tree::DeviceTree;

const EXTENSION: &str = "dts";

impl Records {
    /// Returns the path of an instance's definition.
    ///
    /// # Errors
    ///
    /// If the name is not a valid file name.
    pub fn definition_path(&self, name: &str) -> Result<PathBuf, RecordError> {
        self.path(name, EXTENSION)
    }

    /// Returns an instance's definition; `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// If it exists but cannot be read.
    pub fn load_definition(&self, name: &str) -> Result<Option<DeviceTree>, RecordError> {
        let path = self.definition_path(name)?;
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(io_error("reading", &path))?,
        };
        let mut text = String::new();
        // Read one byte more, so that a text that is too large is refused as such.
        file.take(MAX_TEXT_BYTES as u64 + 1)
            .read_to_string(&mut text)
            .map_err(io_error("reading", &path))?;
        dts::read(&text)
            .map(Some)
            .map_err(|source| RecordError::Source { path, source })
    }

    /// Writes an instance's definition atomically.
    ///
    /// # Errors
    ///
    /// If it cannot be written; the previous file then still exists.
    pub fn save_definition(&self, name: &str, tree: &DeviceTree) -> Result<PathBuf, RecordError> {
        let path = self.definition_path(name)?;
        let text = dts::write(tree).map_err(|source| RecordError::Unprintable {
            path: path.clone(),
            source,
        })?;
        self.write(&path, "dts.tmp", text.as_bytes())?;
        Ok(path)
    }

    /// Removes an instance's definition. A missing definition is not an error.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn remove_definition(&self, name: &str) -> Result<(), RecordError> {
        let path = self.definition_path(name)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("removing", &path)(error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Node;

    #[test]
    fn a_definition_is_kept_beside_the_record_and_not_mixed_up_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::in_directory(directory.path().join("new"));
        assert!(records.load_definition("web").unwrap().is_none());
        let tree = DeviceTree::new(Node::new("").with_text("model", "web"));
        let path = records.save_definition("web", &tree).unwrap();
        assert_eq!(records.load_definition("web").unwrap(), Some(tree));
        assert!(records.load("web").unwrap().is_none());
        fs::write(&path, "no tree").unwrap();
        let error = records.load_definition("web").unwrap_err();
        assert!(error.to_string().contains("web.dts"), "{error}");
        records.remove_definition("web").unwrap();
        records.remove_definition("web").unwrap();
        assert!(!path.exists());
        assert_eq!(
            fs::read_dir(directory.path().join("new")).unwrap().count(),
            0
        );
        let outside = records.save_definition("../web", &DeviceTree::default());
        assert!(matches!(outside, Err(RecordError::Name(_))));
    }
}
