//! The real kerf as a judge: one Python process that has imported kerf.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The kind of document as which a tree is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum As {
    Baseline,
    System,
    Instance,
    Overlay,
}

pub(crate) struct Kerf {
    process: Child,
    requests: ChildStdin,
    answers: ChildStdout,
}

/// Returns the directory in which `scripts/fetch-kerf` installs kerf.
pub(crate) fn home() -> PathBuf {
    let set = std::env::var_os("KMORPH_CACHE_DIR").filter(|dir| !dir.is_empty());
    let cache = set.map(PathBuf::from).unwrap_or_else(|| {
        let shared = PathBuf::from("/var/cache/kmorph");
        let own = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
        // Like the script: root uses the shared directory.
        match std::fs::metadata("/proc/self").map(|own| std::os::unix::fs::MetadataExt::uid(&own)) {
            Ok(0) => shared,
            _ => own.unwrap_or_else(home).join("kmorph"),
        }
    });
    cache.join("tools/kerf")
}

/// Returns the command that runs a script beside this file, with the Python in which kerf is installed.
pub(crate) fn python(script: &str) -> Command {
    let python = home().join("bin/python");
    assert!(
        python.exists(),
        "no {}: run scripts/fetch-kerf",
        python.display()
    );
    let mut command = Command::new(python);
    // kerf must not write into its installation directory.
    command.arg("-B").arg(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/beside")
            .join(script),
    );
    command
}

impl Kerf {
    pub(crate) fn start() -> Self {
        let mut process = python("judge.py")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            requests: process.stdin.take().unwrap(),
            answers: process.stdout.take().unwrap(),
            process,
        }
    }

    /// Returns the reason why kerf refuses the tree; `None` if kerf accepts the tree.
    pub(crate) fn refuses(
        &mut self,
        kind: As,
        iomem: &[(u64, u64)],
        blob: &[u8],
    ) -> Option<String> {
        let mut request = vec![kind as u8];
        request.extend_from_slice(&u16::try_from(iomem.len()).unwrap().to_be_bytes());
        request.extend_from_slice(&u32::try_from(blob.len()).unwrap().to_be_bytes());
        for (base, size) in iomem {
            request.extend_from_slice(&base.to_be_bytes());
            request.extend_from_slice(&size.to_be_bytes());
        }
        request.extend_from_slice(blob);
        self.requests.write_all(&request).unwrap();
        let mut header = [0; 5];
        self.answers.read_exact(&mut header).expect("kerf is alive");
        let mut reason = vec![0; u32::from_be_bytes(header[1..].try_into().unwrap()) as usize];
        self.answers.read_exact(&mut reason).unwrap();
        (header[0] == 0).then(|| String::from_utf8(reason).unwrap())
    }
}

impl Drop for Kerf {
    fn drop(&mut self) {
        // The process ends at the end of its input; the kill also ends a process that hangs.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
