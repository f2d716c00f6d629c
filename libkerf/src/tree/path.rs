//! The path of a node, for messages and lookups.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The path of a node in messages: `/instances/web/resources`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
pub struct NodePath(String);

impl NodePath {
    /// Returns the root, `/`.
    #[must_use]
    pub fn root() -> Self {
        Self(String::new())
    }

    /// Returns the path of a child of this node.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self(format!("{}/{name}", self.0))
    }

    /// Returns the path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        if self.0.is_empty() { "/" } else { &self.0 }
    }
}

impl From<&str> for NodePath {
    fn from(path: &str) -> Self {
        Self(path.trim_end_matches('/').to_owned())
    }
}

impl fmt::Display for NodePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Returns the parts of an absolute path; `None` if it does not start with `/`. Repeated slashes
/// count as one, as in libfdt.
pub(super) fn parts(path: &str) -> Option<impl Iterator<Item = &str>> {
    path.strip_prefix('/')
        .map(|rest| rest.split('/').filter(|part| !part.is_empty()))
}

/// Returns whether libfdt finds a node with this name when it looks for `wanted`.
pub(super) fn is_found_by(name: &str, wanted: &str) -> bool {
    match name.strip_prefix(wanted) {
        Some("") => true,
        Some(rest) => rest.starts_with('@') && !wanted.contains('@'),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_as_device_tree_paths_do() {
        assert_eq!(NodePath::root().to_string(), "/");
        assert_eq!(
            NodePath::root().child("a").child("b@1").to_string(),
            "/a/b@1"
        );
        assert_eq!(NodePath::from("/a/"), NodePath::root().child("a"));
        assert_eq!(NodePath::from("/"), NodePath::root());
    }

    #[test]
    fn a_unit_address_that_was_asked_for_must_match() {
        assert!(is_found_by("memory@0", "memory@0"));
        assert!(!is_found_by("memory@01", "memory@0"));
        assert!(is_found_by("memory@01", "memory"));
        assert!(!is_found_by("memory-add", "memory"));
    }
}
