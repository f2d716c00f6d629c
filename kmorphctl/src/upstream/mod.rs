//! Converts the configuration of the C project of the same name ("upstream").
//!
//! That project's `kmorph` keeps one kernel, the successor, ready beside the host's. Its `kmorphd` runs in the
//! successor and takes over the machine when the host's kernel falls silent. Both read one file,
//! `/etc/kmorph/kmorph.conf`, with one `key = value` per line; `#` starts a comment.
//!
//! * [`read`] parses such a file as upstream's `lib/config.c` does, and reports each error with its line.
//! * [`Import`] has the conversion of each key, or the reason why it cannot be converted.

mod convert;
mod parse;
mod values;

pub(crate) use convert::{Fate, Import, shell};
pub(crate) use parse::{Fault, read};
