//! The configuration of upstream's C project of the same name, and what becomes of it here.
//!
//! That project's `kmorph` keeps one kernel, the successor, ready beside the host's. Its `kmorphd` runs in the successor
//! and takes the machine over when the host's kernel falls silent. Both read one file, `/etc/kmorph/kmorph.conf`:
//! `key = value`, one in a line, `#` begins a comment.
//!
//! * [`read`] reads such a file as upstream's `lib/config.c` does, and names each fault with its line.
//! * [`Import`] says what each key becomes, or why there is nothing that it could become.

mod convert;
mod parse;
mod values;

pub(crate) use convert::{Fate, Import, shell};
pub(crate) use parse::{Fault, read};
