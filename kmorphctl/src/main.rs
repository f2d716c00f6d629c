//! `kmorphctl`: see the library of this package and docs/cli.md.

use std::process::ExitCode;

fn main() -> ExitCode {
    kmorphctl::run()
}
