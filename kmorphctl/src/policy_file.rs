//! Policy files: TOML, one table per instance.
//!
//! ```toml
//! [instance.web]
//! heartbeat_timeout_s = 1.0
//! auto_heal = true
//! morph_timeout_s = 60.0
//! vmcore = "off"
//! stuck_cpu = "degraded"
//! ```
//!
//! A file is applied completely or not at all. Errors name line and column, which are unknown to the daemon; so
//! every rule that does not depend on an instance is checked here first, and again by the daemon.

use std::collections::BTreeMap;
use std::ops::Range;

use kmorph_control_api::{Policy, PolicySet, StuckCpuPolicy, VmcorePolicy};
use serde::Deserialize;
use toml::Spanned;

use crate::failure::Failure;

/// Header of an exported set.
const HEADER: &str = "# kmorph policies. Apply with: kmorphctl policy import <this file>\n\n";

/// A policy file whose own contents are valid.
#[derive(Debug)]
pub(crate) struct PolicyFile {
    /// Its contents.
    pub(crate) set: PolicySet,
    source: Source,
    places: BTreeMap<String, Range<usize>>,
}

/// The text and its name.
#[derive(Debug)]
struct Source {
    name: String,
    text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    instance: BTreeMap<String, Spanned<WrittenPolicy>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPolicy {
    heartbeat_timeout_s: Spanned<f64>,
    auto_heal: bool,
    morph_timeout_s: Spanned<f64>,
    #[serde(default)]
    vmcore: VmcorePolicy,
    #[serde(default)]
    stuck_cpu: StuckCpuPolicy,
}

impl Source {
    /// Returns `file:line:column`, both from 1, the column in characters.
    fn place(&self, at: usize) -> String {
        let before = self.text.get(..at).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |end| end + 1);
        let column = before.get(start..).unwrap_or("").chars().count() + 1;
        format!("{}:{line}:{column}", self.name)
    }

    fn refuse(&self, at: usize, why: &str) -> Failure {
        Failure::invalid(format!("{}: {why}", self.place(at)))
            .hint("nothing was changed; correct the file and import it again")
    }
}

impl PolicyFile {
    /// Parses `text`, with the name `name` in failures.
    ///
    /// # Errors
    /// The first error: syntax, an unknown or missing key, or a value out of range.
    pub(crate) fn parse(name: String, text: String) -> Result<Self, Failure> {
        let source = Source { name, text };
        let written: Written = toml::from_str(&source.text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            source.refuse(at, error.message())
        })?;
        let mut set = PolicySet::default();
        let mut places = BTreeMap::new();
        for (name, entry) in written.instance {
            places.insert(name.clone(), entry.span());
            let entry = entry.into_inner();
            let policy = Policy {
                heartbeat_timeout_s: *entry.heartbeat_timeout_s.get_ref(),
                auto_heal: entry.auto_heal,
                morph_timeout_s: *entry.morph_timeout_s.get_ref(),
                vmcore: entry.vmcore,
                stuck_cpu: entry.stuck_cpu,
            };
            if let Some((key, why)) = policy.fault() {
                let span = match key {
                    "morph_timeout_s" => entry.morph_timeout_s.span(),
                    _ => entry.heartbeat_timeout_s.span(),
                };
                let why = format!("instance.{name}.{key}: {why}");
                return Err(source.refuse(span.start, &why));
            }
            set.instance.insert(name, policy);
        }
        Ok(Self {
            set,
            source,
            places,
        })
    }

    /// Refuses the file if it names an instance without a policy in force.
    pub(crate) fn check_names(&self, in_force: &PolicySet) -> Result<(), Failure> {
        for (name, place) in &self.places {
            if !in_force.instance.contains_key(name) {
                let why = format!("no instance {name:?}");
                let mut failure = self.source.refuse(place.start, &why);
                failure.exit = crate::exit::Exit::NotFound;
                return Err(failure);
            }
        }
        Ok(())
    }
}

/// Returns the set in the format of [`PolicyFile::parse`].
pub(crate) fn render(set: &PolicySet) -> Result<String, Failure> {
    let body = toml::to_string(set)
        .map_err(|error| Failure::internal(format!("cannot write the policies: {error}")))?;
    Ok(format!("{HEADER}{body}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[instance.web]\nheartbeat_timeout_s = 1\nauto_heal = true\n\
                        morph_timeout_s = 60.0\n";

    fn refused(text: &str) -> String {
        PolicyFile::parse("p.toml".to_owned(), text.to_owned())
            .unwrap_err()
            .message
    }

    #[test]
    fn what_is_exported_can_be_imported() {
        let file = PolicyFile::parse("p".to_owned(), GOOD.to_owned()).unwrap();
        let again = PolicyFile::parse("p".to_owned(), render(&file.set).unwrap()).unwrap();
        assert_eq!(file.set, again.set);
        assert_eq!(file.set.instance["web"].heartbeat_timeout_s, 1.0);
    }

    #[test]
    fn one_bad_line_is_named_with_line_and_column() {
        let bad = [
            (
                "= 1\n",
                "= 1e9\n",
                "p.toml:2:23: instance.web.heartbeat_timeout_s",
            ),
            (
                "= 60.0",
                "= 0.1",
                "p.toml:4:19: instance.web.morph_timeout_s",
            ),
            (
                "= 60.0",
                "= nan",
                "p.toml:4:19: instance.web.morph_timeout_s",
            ),
            ("= true", "= \"yes\"", "p.toml:3:13: "),
            ("auto_heal", "auto_hael", "p.toml:3:1: "),
            ("= true", "true", "p.toml:3:11: "),
            ("[instance.web]", "[instances.web]", "p.toml:1:2: "),
        ];
        for (from, to, place) in bad {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD);
            let said = refused(&text);
            assert!(said.starts_with(place), "{said}");
        }
        let missing = GOOD.replace("auto_heal = true\n", "");
        assert!(refused(&missing).contains("auto_heal"));
    }

    #[test]
    fn an_unknown_instance_is_named_with_its_place() {
        let file = PolicyFile::parse("p.toml".to_owned(), format!("# first\n{GOOD}")).unwrap();
        let failure = file.check_names(&PolicySet::default()).unwrap_err();
        assert!(failure.message.starts_with("p.toml:2:"), "{failure}");
        assert_eq!(failure.exit, crate::exit::Exit::NotFound);
        assert!(file.check_names(&file.set).is_ok());
    }
}
