//! The name of an instance, parsed once on input.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest instance name in bytes: it must fit a host name label and a socket path.
pub const INSTANCE_NAME_MAX_BYTES: usize = 63;

/// An instance's name: 1 to [`INSTANCE_NAME_MAX_BYTES`] of `a-z 0-9 . _ -`, beginning with a letter
/// or digit, so that it is safe as a file name, a table cell and a metric label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceName(String);

impl InstanceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The reason why a text is not a valid instance name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid instance name {text:?}: {reason}; use 1 to {INSTANCE_NAME_MAX_BYTES} of a-z 0-9 . _ - \
     beginning with a letter or digit"
)]
pub struct InvalidInstanceName {
    text: String,
    reason: &'static str,
}

impl FromStr for InstanceName {
    type Err = InvalidInstanceName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |reason| {
            let text = text.chars().take(INSTANCE_NAME_MAX_BYTES + 1).collect();
            Err(InvalidInstanceName { text, reason })
        };
        if text.is_empty() {
            return refuse("empty");
        }
        if text.len() > INSTANCE_NAME_MAX_BYTES {
            return refuse("too long");
        }
        if !text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) {
            return refuse("does not begin with a lowercase letter or a digit");
        }
        let allowed =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-');
        if !text.chars().all(allowed) {
            return refuse(
                "contains characters other than lowercase letters, digits, '.', '_' and '-'",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for InstanceName {
    type Error = InvalidInstanceName;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<InstanceName> for String {
    fn from(name: InstanceName) -> Self {
        name.0
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_are_taken_as_they_are() {
        for name in ["web", "web-server", "db.1", "0", "a_b"] {
            assert_eq!(name.parse::<InstanceName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_could_escape_a_directory_or_break_a_table_are_refused() {
        let long = "a".repeat(INSTANCE_NAME_MAX_BYTES + 1);
        for name in [
            "", ".", "..", "-x", "../x", "a/b", "A", "a b", "ü", "a\n", &long,
        ] {
            assert!(name.parse::<InstanceName>().is_err(), "{name:?}");
        }
    }
}
