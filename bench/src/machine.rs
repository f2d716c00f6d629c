//! The machine of a measurement: figures of one machine do not apply to another.

use std::process::Command;

use serde::Serialize;

/// The machine, the time, and the version measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// Start of the run, UTC.
    pub(crate) date: String,
    /// The version measured, from `git describe`; `unknown` outside a checkout.
    pub(crate) version: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    /// Load average over one minute at the start of the run: if above a fraction, the machine was not quiet.
    pub(crate) load: String,
}

impl Machine {
    pub(crate) fn read() -> Self {
        let cpuinfo = text("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let total = text("/proc/meminfo").lines().find_map(|line| {
            let kib = line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?;
            kib.parse::<u64>().ok()
        });
        let load = text("/proc/loadavg");
        Self {
            date: format!("{:.0}", jiff::Timestamp::now()),
            version: version(),
            cpu: field("model name").unwrap_or_else(|| "unknown".to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: total.unwrap_or(0) / 1024,
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: load.split(' ').next().unwrap_or("unknown").to_owned(),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}, kmorph {}, {} ({} CPUs), {} MiB of memory, Linux {}, load {} at the beginning",
            self.date, self.version, self.cpu, self.cpus, self.memory_mib, self.kernel, self.load
        )
    }
}

fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn version() -> String {
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => "unknown".to_owned(),
    }
}
