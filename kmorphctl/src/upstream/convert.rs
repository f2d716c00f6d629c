//! The conversion of each key, or the reason why it is not converted.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use kmorph_control_api::{POLICY_MAX_TIMEOUT_S, POLICY_MIN_HEARTBEAT_S};
use kmorph_launch::InstanceName;

use super::parse::{Said, Upstream};

/// Upstream's default of `name`.
const DEFAULT_NAME: &str = "successor";
/// Upstream's default of `probe_interval`, milliseconds.
const DEFAULT_PROBE_INTERVAL_MS: u64 = 100;
/// Upstream's default of `probe_timeouts`.
const DEFAULT_PROBE_TIMEOUTS: u64 = 5;
/// Size of a pool in addition to the memory of its kernels, bytes: upstream's `kmorph arm` adds one x86 memory block.
const POOL_SPARE_BYTES: u64 = 128 << 20;
/// Minimum memory of an instance in kmorphd, MiB.
const MEMORY_MIN_MIB: u64 = 16;
const MIB: u64 = 1 << 20;

/// A key of the file, and the result of its conversion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fate {
    /// The key's line in the file, from 1.
    pub(crate) line: usize,
    /// The key.
    pub(crate) key: &'static str,
    /// The target, or the reason why there is none.
    pub(crate) text: String,
}

/// The conversion of an upstream file.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Import {
    /// `defaults.heartbeat_timeout_s`.
    heartbeat_timeout_s: Option<f64>,
    /// `defaults.memory_mib`.
    memory_mib: Option<u64>,
    /// `vmcore.dir`.
    vmcore_dir: Option<String>,
    /// Converted keys.
    pub(crate) taken: Vec<Fate>,
    /// Keys that were not converted.
    pub(crate) not_taken: Vec<Fate>,
    /// The command that creates the pool; `None` without CPUs and memory for it.
    pub(crate) pool_command: Option<Vec<String>>,
    /// The command that starts the instance; `None` without a kernel.
    pub(crate) spawn_command: Option<Vec<String>>,
}

impl Import {
    /// Converts the contents of a file.
    pub(crate) fn of(said: &Upstream) -> Self {
        let mut import = Self::default();
        import.pool(said);
        import.instance(said);
        import.detection(said);
        import.dump(said);
        import.left_out(said);
        import.taken.sort_by_key(|fate| fate.line);
        import.not_taken.sort_by_key(|fate| fate.line);
        import
    }

    fn take<T>(&mut self, key: &'static str, said: &Said<T>, into: impl Into<String>) {
        let (line, text) = (said.line, into.into());
        self.taken.push(Fate { line, key, text });
    }

    fn leave<T>(&mut self, key: &'static str, said: Option<&Said<T>>, why: impl Into<String>) {
        if let Some(said) = said {
            let (line, text) = (said.line, why.into());
            self.not_taken.push(Fate { line, key, text });
        }
    }

    /// Converts CPUs and memory, which come from the kernel's pool.
    fn pool(&mut self, said: &Upstream) {
        if let Some(cpus) = &said.cpus {
            self.take(
                "cpus",
                cpus,
                "kerf init --cpus, and their number: spawn --cpus",
            );
        }
        match &said.memory {
            Some(memory) if memory.value > 0 => {
                let mib = memory.value.div_ceil(MIB).max(MEMORY_MIN_MIB);
                self.memory_mib = Some(mib);
                let into = "defaults.memory_mib, and with 128 MiB to spare kerf init --memory";
                self.take("memory", memory, into);
            }
            memory => self.leave(
                "memory",
                memory.as_ref(),
                "the value is 0, so kmorph's default applies",
            ),
        }
        if let (Some(cpus), Some(mib)) = (&said.cpus, self.memory_mib) {
            let list: Vec<_> = cpus.value.iter().map(u64::to_string).collect();
            self.pool_command = Some(vec![
                "kerf".to_owned(),
                "init".to_owned(),
                format!("--cpus={}", list.join(",")),
                format!("--memory={}MB", mib + POOL_SPARE_BYTES / MIB),
            ]);
        }
    }

    /// The command that starts upstream's successor.
    fn instance(&mut self, said: &Upstream) {
        let name = match &said.name {
            None => DEFAULT_NAME.to_owned(),
            Some(name) => match name.value.parse::<InstanceName>() {
                Ok(valid) => {
                    self.take("name", name, "spawn NAME");
                    valid.as_str().to_owned()
                }
                Err(error) => {
                    self.leave("name", Some(name), error.to_string());
                    DEFAULT_NAME.to_owned()
                }
            },
        };
        let kernel = said.kernel.as_ref();
        if let Some(kernel) = kernel {
            let into =
                "spawn --kernel, which takes a bzImage only (upstream also takes an ELF vmlinux)";
            self.take("kernel", kernel, into);
        }
        if let Some(cmdline) = &said.cmdline {
            let into =
                "spawn --kernel-cmdline, appended to the options that kmorph gives every kernel";
            self.take("cmdline", cmdline, into);
        }
        let Some(kernel) = kernel else { return };
        let mut words = vec!["kmorphctl".to_owned(), "spawn".to_owned(), name];
        words.push(format!("--kernel={}", kernel.value));
        if let Some(cpus) = &said.cpus {
            words.push(format!("--cpus={}", cpus.value.len()));
        }
        if let Some(cmdline) = &said.cmdline {
            words.push(format!("--kernel-cmdline={}", cmdline.value));
        }
        self.spawn_command = Some(words);
    }

    /// Converts the silence after which upstream's kmorphd acts.
    fn detection(&mut self, said: &Upstream) {
        let (interval, timeouts) = (&said.probe_interval_ms, &said.probe_timeouts);
        if interval.is_none() && timeouts.is_none() {
            return;
        }
        let or = |said: &Option<Said<u64>>, default| said.as_ref().map_or(default, |s| s.value);
        let milliseconds = or(interval, DEFAULT_PROBE_INTERVAL_MS)
            .saturating_mul(or(timeouts, DEFAULT_PROBE_TIMEOUTS));
        let seconds = Duration::from_millis(milliseconds).as_secs_f64();
        let range = POLICY_MIN_HEARTBEAT_S..=POLICY_MAX_TIMEOUT_S;
        let both = [("probe_interval", interval), ("probe_timeouts", timeouts)];
        for (key, said) in both {
            let Some(said) = said else { continue };
            if range.contains(&seconds) {
                let into = "defaults.heartbeat_timeout_s: probe_interval times probe_timeouts";
                self.take(key, said, into);
            } else {
                let why = format!(
                    "probe_interval times probe_timeouts is {seconds} s, and kmorph takes {} to {} s",
                    range.start(),
                    range.end()
                );
                self.leave(key, Some(said), why);
            }
        }
        self.heartbeat_timeout_s = range.contains(&seconds).then_some(seconds);
    }

    /// Converts the path of the memory dump after a failure.
    fn dump(&mut self, said: &Upstream) {
        let Some(dump) = &said.dump else { return };
        let dir = Path::new(&dump.value).parent();
        let dir = dir.filter(|dir| dir.is_absolute()).and_then(Path::to_str);
        match dir {
            Some(dir) => {
                self.vmcore_dir = Some(dir.to_owned());
                let into = "its directory: vmcore.dir, and defaults.vmcore = \"required\". What is captured is an \
                            instance's memory, not the host's";
                self.take("dump", dump, into);
            }
            None => self.leave(
                "dump",
                Some(dump),
                "the path has no absolute directory to use for vmcore.dir",
            ),
        }
    }

    /// Lists the keys that cannot be converted.
    fn left_out(&mut self, said: &Upstream) {
        self.leave(
            "initrd",
            said.initrd.as_ref(),
            "it boots upstream's kmorphd; kmorph builds an image with its own agent, and spawn --initramfs takes one \
             that has it",
        );
        self.leave(
            "devices",
            said.devices.as_ref(),
            "kmorph assigns no devices, but can run an instance that has some: kerf create NAME --devices=… before spawn",
        );
        self.leave(
            "machine_cpus",
            said.machine_cpus.as_ref(),
            "only a kernel that takes over the whole machine needs to know all CPUs",
        );
        self.leave(
            "modules",
            said.modules.as_ref(),
            "kmorph puts the modules that its agent needs into the image that it builds; spawn --initramfs takes an \
             image with others",
        );
        self.leave(
            "fence_retries",
            said.fence_retries.as_ref(),
            "if a fence is not confirmed, kmorph reuses none of the kernel's resources and asks the operator",
        );
        let console = "kerf provides the console of an instance: kerf console NAME";
        self.leave("console", said.console.as_ref(), console);
        self.leave("console_baud", said.console_baud.as_ref(), console);
        self.leave("console_login", said.console_login.as_ref(), console);
    }

    /// Returns the configuration of kmorphd. `source` is the name of the converted file.
    pub(crate) fn toml(&self, source: &str) -> String {
        let mut text = String::new();
        let mut comment = |line: &str| {
            // The name of the file may contain characters that are invalid in a comment.
            let clean = line.replace(|c: char| c.is_control() && c != '\t', "?");
            text.push_str(format!("# {clean}").trim_end());
            text.push('\n');
        };
        comment(
            "kmorphd.conf, the configuration of kmorphd, made by kmorphctl import-upstream-config from",
        );
        comment(source);
        comment("");
        comment(
            "Upstream's kmorphd runs in a second kernel and takes the machine over when the host's kernel dies.",
        );
        comment(
            "This kmorphd runs on the host's kernel, and watches, heals and morphs the kernels beside it. It",
        );
        comment("does not watch the host's own.");
        self.commands(&mut comment);
        if !self.taken.is_empty() {
            comment("");
            comment("Taken over:");
            self.taken
                .iter()
                .for_each(|fate| comment(&format!("  {fate}")));
        }
        if !self.not_taken.is_empty() {
            comment("");
            comment("Not taken over:");
            self.not_taken
                .iter()
                .for_each(|fate| comment(&format!("  {fate}")));
        }
        text.push_str("\nbackend = \"multikernel\"\n");
        self.tables(&mut text);
        text
    }

    fn commands(&self, comment: &mut impl FnMut(&str)) {
        if let Some(words) = &self.pool_command {
            comment("");
            comment("The pool; a morph needs as many CPUs and as much memory again:");
            comment(&format!("  {}", shell(words)));
        }
        if let Some(words) = &self.spawn_command {
            comment("");
            comment("The instance, once kmorphd runs; --workload=PROGRAM says what runs in it:");
            comment(&format!("  {}", shell(words)));
        }
    }

    fn tables(&self, text: &mut String) {
        let mut table = |name: &str, values: &[Option<String>]| {
            let values: Vec<_> = values.iter().flatten().cloned().collect();
            if !values.is_empty() {
                // A write to a String does not fail.
                let _ = write!(text, "\n[{name}]\n{}\n", values.join("\n"));
            }
        };
        let timeout = self.heartbeat_timeout_s;
        let memory = self.memory_mib;
        table(
            "defaults",
            &[
                timeout.map(|seconds| format!("heartbeat_timeout_s = {seconds:?}")),
                memory.map(|mib| format!("memory_mib = {mib}")),
                // Upstream does not return memory either if the dump failed.
                self.vmcore_dir
                    .is_some()
                    .then(|| "vmcore = \"required\"".to_owned()),
            ],
        );
        let dir = self.vmcore_dir.as_ref();
        let dir = dir.map(|dir| format!("dir = {}", toml::Value::from(dir.as_str())));
        table("vmcore", &[dir]);
    }
}

impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}, {}: {}", self.line, self.key, self.text)
    }
}

/// Words, quoted for a shell.
pub(crate) fn shell(words: &[String]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| quote(word)).collect();
    quoted.join(" ")
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::upstream::read;

    /// All keys, each with a different value.
    const ALL: &str = "# of the machine in the corner\n\
        name = backup\ncpus = 12-15,20\nmemory = 4GB\nkernel = /boot/vmlinuz-6.12\n\
        initrd = /var/lib/kmorph/successor.img\ncmdline = quiet it's=1\n\
        devices = 0000:09:00.0, 0000:0a:00.0\nmachine_cpus = 0-31\nmodules = mk_transport\n\
        probe_interval = 250ms\nprobe_timeouts = 8\nfence_retries = 1\n\
        dump = /var/crash/host.vmcore\nconsole = ttyS1\nconsole_baud = 9600\n\
        console_login = /bin/sh\n";

    fn import(text: &str) -> Import {
        Import::of(&read(text.as_bytes()).unwrap())
    }

    fn keys(fates: &[Fate]) -> Vec<&'static str> {
        fates.iter().map(|fate| fate.key).collect()
    }

    #[test]
    fn every_key_is_taken_over_or_named() {
        let import = import(ALL);
        let taken = [
            "name",
            "cpus",
            "memory",
            "kernel",
            "cmdline",
            "probe_interval",
            "probe_timeouts",
            "dump",
        ];
        let not_taken = [
            "initrd",
            "devices",
            "machine_cpus",
            "modules",
            "fence_retries",
            "console",
            "console_baud",
            "console_login",
        ];
        assert_eq!(keys(&import.taken), taken);
        assert_eq!(keys(&import.not_taken), not_taken);
        let of = |key| {
            import
                .not_taken
                .iter()
                .find(|fate| fate.key == key)
                .unwrap()
        };
        assert_eq!((of("initrd").line, of("console_login").line), (6, 17));
        let pool = shell(&import.pool_command.unwrap());
        assert_eq!(pool, "kerf init --cpus=12,13,14,15,20 --memory=4224MB");
        let spawn = shell(&import.spawn_command.unwrap());
        let wanted = "kmorphctl spawn backup --kernel=/boot/vmlinuz-6.12 --cpus=5 \
                      '--kernel-cmdline=quiet it'\\''s=1'";
        assert_eq!(spawn, wanted);
    }

    #[test]
    fn the_configuration_has_the_values() {
        let text = import(ALL).toml("kmorph.conf");
        let table: toml::Table = toml::from_str(&text).unwrap();
        let value = |table: &toml::Table, of: &str, key: &str| table[of][key].clone();
        assert_eq!(table["backend"].as_str(), Some("multikernel"));
        let timeout = value(&table, "defaults", "heartbeat_timeout_s");
        assert_eq!(timeout.as_float(), Some(2.0));
        let memory = value(&table, "defaults", "memory_mib");
        assert_eq!(memory.as_integer(), Some(4096));
        let dir = value(&table, "vmcore", "dir");
        assert_eq!(dir.as_str(), Some("/var/crash"));
        let policy = value(&table, "defaults", "vmcore");
        assert_eq!(policy.as_str(), Some("required"));
        assert!(text.contains("#   line 13, fence_retries: "), "{text}");
    }

    #[test]
    fn an_empty_file_leaves_the_defaults() {
        let import = import("# nothing\ncmdline =\n");
        assert_eq!(import, Import::default());
        let table: toml::Table = toml::from_str(&import.toml("x\ny")).unwrap();
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn what_is_out_of_range_here_is_named() {
        let import = import(
            "name = Back/up\nprobe_interval = 10ms\nprobe_timeouts = 2\nmemory = 0\n\
             kernel = /v\ndump = core\n",
        );
        let named = ["name", "probe_interval", "probe_timeouts", "memory", "dump"];
        assert_eq!(keys(&import.not_taken), named);
        assert!(import.not_taken[1].text.contains("0.02 s"), "{import:?}");
        let spawn = shell(&import.spawn_command.clone().unwrap());
        assert_eq!(spawn, "kmorphctl spawn successor --kernel=/v");
        let table: toml::Table = toml::from_str(&import.toml("x")).unwrap();
        assert_eq!(table.len(), 1, "{table}");
    }

    /// Lines that are almost valid, and some that are completely invalid.
    fn lines() -> impl Strategy<Value = Vec<u8>> {
        let key = prop::sample::select(vec![
            "name",
            "cpus",
            "memory",
            "kernel",
            "initrd",
            "cmdline",
            "devices",
            "machine_cpus",
            "modules",
            "probe_interval",
            "probe_timeouts",
            "fence_retries",
            "dump",
            "console",
            "console_baud",
            "console_login",
            "bogus",
            "",
        ]);
        let value = prop_oneof![
            "[0-9]{1,20}(ms|s|m|[KMGT]B?|-[0-9]{1,6}|,)?",
            "[0-9,-]{0,12}",
            "/[a-z\"'\\\\ .]{0,12}",
            "\\PC{0,12}",
            "[ \t]{0,3}",
        ];
        let line = (key, "[ \t]{0,2}=[ \t\r]{0,2}", value)
            .prop_map(|(key, equals, value)| format!("{key}{equals}{value}").into_bytes());
        let any = prop::collection::vec(any::<u8>(), 0..24);
        let one = prop_oneof![8 => line, 1 => any];
        prop::collection::vec(one, 0..20).prop_map(|lines| lines.join(&b'\n'))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Any file is either refused with errors that name its lines, or every key in it has a result and the
        /// output is TOML with values that kmorphd accepts.
        #[test]
        fn garbage_is_refused_by_line_or_becomes_sound_toml(bytes in lines()) {
            let count = bytes.split(|byte| *byte == b'\n').count();
            match read(&bytes) {
                Err(faults) => {
                    prop_assert!(!faults.is_empty() && faults.len() <= count);
                    prop_assert!(faults.iter().all(|fault| (1..=count).contains(&fault.line)));
                }
                Ok(said) => sound(&Import::of(&said), &said)?,
            }
        }
    }

    fn sound(import: &Import, said: &Upstream) -> Result<(), TestCaseError> {
        let text = import.toml("a file");
        let table: toml::Table = toml::from_str(&text)
            .map_err(|error| TestCaseError::fail(format!("{error}: {text}")))?;
        let value = |of: &str, key: &str| table.get(of).and_then(|table| table.get(key)).cloned();
        if let Some(seconds) = value("defaults", "heartbeat_timeout_s") {
            let range = POLICY_MIN_HEARTBEAT_S..=POLICY_MAX_TIMEOUT_S;
            prop_assert!(seconds.as_float().is_some_and(|s| range.contains(&s)));
        }
        if let Some(mib) = value("defaults", "memory_mib") {
            prop_assert!(
                mib.as_integer()
                    .is_some_and(|mib| (16..=1 << 32).contains(&mib))
            );
        }
        if let Some(dir) = value("vmcore", "dir") {
            prop_assert!(dir.as_str().is_some_and(|dir| dir.starts_with('/')));
        }
        // The fields that are set, counted in the debug output, so that later fields count too.
        let set = format!("{said:?}").matches("Some(Said").count();
        prop_assert_eq!(import.taken.len() + import.not_taken.len(), set);
        Ok(())
    }
}
