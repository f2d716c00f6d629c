//! The command line.

use std::net::SocketAddr;

use kmorph_workload::MEMORY_ENV;
use kmorph_workload::arena::{MAX_CAPACITY, MIN_CAPACITY};
use kmorph_workload::handover::MAX_CONNECTIONS;

use crate::resp::Limits;

/// The output of `--help`.
pub(crate) const HELP: &str = "\
kmorph-kv: an in-memory key-value server that speaks RESP, the reference workload of kmorph

Usage: kmorph-kv [--listen <address:port>] [options]

Under an agent it takes its listening sockets and its role from there; alone it needs --listen.

Options:
  --listen <address:port>   listen here too, under the name \"listen\" (may be given more than once)
  --max-memory <size>       memory for keys and values, 1mb to 16tb; suffixes kb, mb, gb (default: 1gb,
                            or four fifths of $KMORPH_MEMORY_BYTES where that is less)
  --max-bulk <size>         longest value in a command, up to 512mb (64mb)
  --max-clients <number>    clients at a time, up to 10000 (10000)
  -h, --help                this text
  -V, --version             version
";

const MIB: u64 = 1 << 20;
/// Default size of the arena, in bytes, unless the instance's memory requires a smaller one. Memory is allocated only
/// as the arena fills.
const DEFAULT_MEMORY: u64 = 1 << 30;
/// Share of the instance's memory for keys and values, in percent; the rest is for connections and the program itself.
const ARENA_SHARE_PERCENT: u64 = 80;
/// Share of the instance's memory for one incoming command, in percent: its buffer takes twice as much when it grows.
const COMMAND_SHARE_PERCENT: u64 = 10;
const DEFAULT_BULK: u64 = 64 * MIB;
const MAX_BULK: u64 = 512 * MIB;

/// The command-line options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) listen: Vec<SocketAddr>,
    /// In bytes, a multiple of the page size.
    pub(crate) max_memory: u64,
    /// In bytes.
    pub(crate) max_bulk: usize,
    /// Memory for one command, in bytes.
    pub(crate) room: usize,
    pub(crate) max_clients: usize,
}

impl Options {
    /// Returns the limits on the size of commands.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            bulk: self.max_bulk,
            command: self.room,
        }
    }
}

/// The result of parsing the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    Run(Options),
    Help,
    Version,
}

/// Returns the size of the arena without `--max-memory`. `allowed` is the value in the environment; 0 or absent for no
/// limit.
fn default_memory(allowed: Option<&str>) -> u64 {
    let allowed = allowed.and_then(|text| text.parse::<u64>().ok());
    let share =
        |bytes: u64| (bytes / 100 * ARENA_SHARE_PERCENT).clamp(MIN_CAPACITY, DEFAULT_MEMORY);
    let bytes = allowed
        .filter(|bytes| *bytes > 0)
        .map_or(DEFAULT_MEMORY, share);
    bytes / 4096 * 4096
}

/// Returns the memory for one command, in bytes; unlimited if the environment sets no limit.
fn room(allowed: Option<&str>) -> usize {
    let allowed = allowed.and_then(|text| text.parse::<u64>().ok());
    let share = allowed.filter(|bytes| *bytes > 0);
    let share = share.map(|bytes| bytes / 100 * COMMAND_SHARE_PERCENT);
    share
        .and_then(|bytes| usize::try_from(bytes).ok())
        .unwrap_or(usize::MAX)
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let allowed = std::env::var(MEMORY_ENV).ok();
    let mut options = Options {
        listen: Vec::new(),
        room: room(allowed.as_deref()),
        max_memory: default_memory(allowed.as_deref()),
        max_bulk: usize::try_from(DEFAULT_BULK).unwrap_or(usize::MAX),
        max_clients: MAX_CONNECTIONS,
    };
    let mut args = args;
    while let Some(arg) = args.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg, None),
        };
        let mut value = || {
            inline
                .clone()
                .or_else(|| args.next())
                .ok_or_else(|| format!("{name} needs a value; see --help"))
        };
        match name.as_str() {
            "-h" | "--help" => return Ok(Parsed::Help),
            "-V" | "--version" => return Ok(Parsed::Version),
            "--listen" => {
                let text = value()?;
                let address = text
                    .parse()
                    .map_err(|_| format!("invalid --listen {text:?}: expected address:port"))?;
                options.listen.push(address);
            }
            "--max-memory" => {
                let bytes = size("--max-memory", &value()?, MIN_CAPACITY, MAX_CAPACITY)?;
                options.max_memory = bytes.next_multiple_of(4096);
            }
            "--max-bulk" => {
                let bytes = size("--max-bulk", &value()?, 1024, MAX_BULK)?;
                options.max_bulk = usize::try_from(bytes).unwrap_or(usize::MAX);
            }
            "--max-clients" => {
                let text = value()?;
                options.max_clients = text
                    .parse()
                    .ok()
                    .filter(|count| (1..=MAX_CONNECTIONS).contains(count))
                    .ok_or_else(|| {
                        format!("invalid --max-clients {text:?}: expected 1 to {MAX_CONNECTIONS}")
                    })?;
            }
            other => return Err(format!("unknown option {other:?}; see --help")),
        }
    }
    Ok(Parsed::Run(options))
}

fn size(option: &str, text: &str, least: u64, most: u64) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &lower[digits.len()..] {
        "" | "b" => Some(0),
        "k" | "kb" | "kib" => Some(10),
        "m" | "mb" | "mib" => Some(20),
        "g" | "gb" | "gib" => Some(30),
        "t" | "tb" | "tib" => Some(40),
        _ => None,
    };
    digits
        .parse::<u64>()
        .ok()
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift))
        .filter(|bytes| (least..=most).contains(bytes))
        .ok_or_else(|| {
            format!("invalid {option} {text:?}: expected a size from {least} to {most} bytes")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Parsed, String> {
        parse(args.iter().map(|arg| (*arg).to_owned()))
    }

    #[test]
    fn options_are_read_in_both_forms() {
        let args = [
            "--listen",
            "127.0.0.1:0",
            "--max-memory=2gb",
            "--max-clients",
            "5",
        ];
        let Ok(Parsed::Run(options)) = run(&args) else {
            panic!("not read");
        };
        assert_eq!(options.max_memory, 2 << 30);
        assert_eq!((options.max_clients, options.listen.len()), (5, 1));
    }

    #[test]
    fn the_default_fits_the_memory_of_the_instance() {
        assert_eq!(default_memory(None), 1 << 30);
        assert_eq!(default_memory(Some("0")), 1 << 30);
        assert_eq!(default_memory(Some("64 GiB")), 1 << 30);
        assert_eq!(default_memory(Some("68719476736")), 1 << 30);
        let of_small = default_memory(Some("150000000"));
        assert!(
            (119_000_000..=120_000_000).contains(&of_small),
            "{of_small}"
        );
        assert_eq!(default_memory(Some("4096")), MIN_CAPACITY);
    }

    #[test]
    fn bad_options_are_named() {
        for (args, expected) in [
            (&["--max-memory", "5"][..], "invalid --max-memory \"5\""),
            (&["--max-memory", "99999999999gb"], "expected a size"),
            (&["--max-bulk=1x"], "--max-bulk \"1x\""),
            (&["--listen", "here"], "--listen \"here\""),
            (&["--listen"], "--listen needs a value"),
            (&["--what"], "unknown option \"--what\""),
        ] {
            let error = run(args).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
