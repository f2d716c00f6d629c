//! Parses the file: lines, keys, and errors in them.

use std::fmt;

use super::values;

/// A value in the file, with its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said<T> {
    /// The line, from 1.
    pub(crate) line: usize,
    /// The value.
    pub(crate) value: T,
}

/// The contents of a file. A missing key, or one without a value, is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Upstream {
    /// The successor's name.
    pub(crate) name: Option<Said<String>>,
    /// Its CPUs, by physical id.
    pub(crate) cpus: Option<Said<Vec<u64>>>,
    /// Its memory, bytes.
    pub(crate) memory: Option<Said<u64>>,
    /// Its kernel's image.
    pub(crate) kernel: Option<Said<String>>,
    /// Its initial file system.
    pub(crate) initrd: Option<Said<String>>,
    /// Its kernel's command line.
    pub(crate) cmdline: Option<Said<String>>,
    /// All CPUs of the machine, by physical id.
    pub(crate) machine_cpus: Option<Said<Vec<u64>>>,
    /// Its PCI functions.
    pub(crate) devices: Option<Said<Vec<String>>>,
    /// Modules in the image of a distribution's builder.
    pub(crate) modules: Option<Said<Vec<String>>>,
    /// Interval between two probes of the host's kernel, milliseconds.
    pub(crate) probe_interval_ms: Option<Said<u64>>,
    /// Number of unanswered probes after which the host's kernel counts as dead.
    pub(crate) probe_timeouts: Option<Said<u64>>,
    /// Maximum number of retries of an incomplete fence.
    pub(crate) fence_retries: Option<Said<u64>>,
    /// The file for the dump of the host's memory.
    pub(crate) dump: Option<Said<String>>,
    /// The serial line to take over.
    pub(crate) console: Option<Said<String>>,
    /// Its speed, baud.
    pub(crate) console_baud: Option<Said<u64>>,
    /// The program on the serial line.
    pub(crate) console_login: Option<Said<String>>,
}

/// An error in a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The line, from 1.
    pub(crate) line: usize,
    /// The error.
    pub(crate) reason: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.reason)
    }
}

/// Parses an upstream file. A repeated key replaces the earlier value; a key without a value is unset.
///
/// # Errors
/// All faults, in the order of the lines.
pub(crate) fn read(bytes: &[u8]) -> Result<Upstream, Vec<Fault>> {
    let mut said = Upstream::default();
    let mut faults = Vec::new();
    for (at, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line_number = at + 1;
        if let Err(reason) = said.take_line(line_number, line) {
            let line = line_number;
            faults.push(Fault { line, reason });
        }
    }
    match faults.is_empty() {
        true => Ok(said),
        false => Err(faults),
    }
}

impl Upstream {
    fn take_line(&mut self, number: usize, line: &[u8]) -> Result<(), String> {
        let mut words = line
            .iter()
            .skip_while(|byte| values::is_space(char::from(**byte)));
        if matches!(words.next(), None | Some(b'#')) {
            return Ok(());
        }
        let text = std::str::from_utf8(line).map_err(|error| {
            let at = error.valid_up_to() + 1;
            format!("byte {at} of the line is not UTF-8")
        })?;
        let text = text.trim_matches(values::is_space);
        if let Some(c) = text.chars().find(|c| c.is_control() && *c != '\t') {
            return Err(format!("the line contains the control character {c:?}"));
        }
        let (key, value) = text
            .split_once('=')
            .ok_or_else(|| "expected key = value".to_owned())?;
        let trim = |text: &str| text.trim_matches(values::is_space).to_owned();
        self.set(number, &trim(key), trim(value))
    }

    fn set(&mut self, line: usize, key: &str, value: String) -> Result<(), String> {
        let refused = |reason: String| format!("{key}: {reason}");
        let text = |value: String| (!value.is_empty()).then_some(Said { line, value });
        let said = |value: u64| Some(Said { line, value });
        match key {
            "name" if value.is_empty() => return Err(refused("a value is required".to_owned())),
            "name" => self.name = text(value),
            "kernel" => self.kernel = text(value),
            "initrd" => self.initrd = text(value),
            "cmdline" => self.cmdline = text(value),
            "dump" => self.dump = text(value),
            "console" => self.console = text(value),
            "console_login" => self.console_login = text(value),
            "cpus" => self.cpus = list(line, values::cpus(&value).map_err(refused)?),
            "machine_cpus" => {
                self.machine_cpus = list(line, values::cpus(&value).map_err(refused)?);
            }
            "devices" => self.devices = words(line, &value).map_err(refused)?,
            "modules" => self.modules = words(line, &value).map_err(refused)?,
            "memory" => self.memory = said(values::size(&value).map_err(refused)?),
            "probe_interval" => {
                self.probe_interval_ms = said(values::milliseconds(&value).map_err(refused)?);
            }
            "probe_timeouts" => {
                self.probe_timeouts = said(values::whole(&value, 1).map_err(refused)?);
            }
            "fence_retries" => {
                self.fence_retries = said(values::whole(&value, 0).map_err(refused)?);
            }
            "console_baud" => {
                self.console_baud = said(values::whole(&value, 1).map_err(refused)?);
            }
            _ => return Err(format!("upstream's kmorph has no key {key:?}")),
        }
        Ok(())
    }
}

fn list<T>(line: usize, value: Vec<T>) -> Option<Said<Vec<T>>> {
    (!value.is_empty()).then_some(Said { line, value })
}

fn words(line: usize, value: &str) -> Result<Option<Said<Vec<String>>>, String> {
    match value {
        "" => Ok(None),
        value => values::words(value).map(|words| list(line, words)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_spaces_are_upstreams() {
        let said = read(b"# one\n\n  name=backup \r\n\tcmdline = a=b # c\nmemory=1\nmemory = 4GB")
            .unwrap();
        let name = "backup".to_owned();
        assert_eq!(
            said.name,
            Some(Said {
                line: 3,
                value: name
            })
        );
        let cmdline = said.cmdline.unwrap();
        assert_eq!((cmdline.line, cmdline.value.as_str()), (4, "a=b # c"));
        let memory = said.memory.unwrap();
        assert_eq!((memory.line, memory.value), (6, 4 << 30));
        assert_eq!(read(b""), Ok(Upstream::default()));
        assert_eq!(
            read(b"cmdline = x\ncmdline =\ncpus=\ndevices=\ndump="),
            Ok(Upstream::default())
        );
    }

    #[test]
    fn every_fault_is_named_with_its_line() {
        let faults =
            read(b"kernel\nname =\nbogus = 1\nmemory = lots\nname = \xff\n# \xff\ndump = \x01\n");
        let faults: Vec<_> = faults.unwrap_err().iter().map(Fault::to_string).collect();
        let begin = [
            "1: expected key = value",
            "2: name: a value is required",
            "3: upstream's kmorph has no key \"bogus\"",
            "4: memory: \"lots\"",
            "5: byte 8 of the line is not UTF-8",
            "7: the line contains the control character",
        ];
        assert_eq!(faults.len(), begin.len(), "{faults:?}");
        for (fault, begin) in faults.iter().zip(begin) {
            assert!(fault.starts_with(begin), "{fault}");
        }
    }
}
