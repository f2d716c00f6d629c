//! Runs commands with `sh`, exactly as shown.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::stage::Stage;
use crate::trouble::Trouble;

/// The shell of a user: kmorphctl in PATH, the daemon's socket in the environment.
pub(crate) struct Shell {
    programs: PathBuf,
    socket: PathBuf,
}

impl Shell {
    pub(crate) fn new(programs: &Path, socket: &Path) -> Self {
        Self {
            programs: programs.to_owned(),
            socket: socket.to_owned(),
        }
    }

    /// Shows the commands with which a user gets the same environment.
    pub(crate) fn show_environment(&self, stage: &Stage) -> Result<(), Trouble> {
        stage.command(&format!("export PATH={}:$PATH", quoted(&self.programs)))?;
        stage.command(&format!("export KMORPH_SOCKET={}", quoted(&self.socket)))
    }

    /// Shows `line`, runs it and passes its output through. The command must succeed.
    pub(crate) fn run(&self, stage: &Stage, line: &str) -> Result<(), Trouble> {
        stage.command(line)?;
        let mut path = self.programs.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let ended = Command::new("sh")
            .args(["-c", line])
            .env("PATH", path)
            .env("KMORPH_SOCKET", &self.socket)
            .stdin(Stdio::null())
            .status();
        let command = || line.to_owned();
        match ended {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(Trouble::Command {
                command: command(),
                status,
            }),
            Err(source) => Err(Trouble::Start {
                command: command(),
                source,
            }),
        }
    }
}

/// Returns a path as a word of a shell line.
pub(crate) fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        for path in [
            "/tmp/a-b_c.d",
            "/tmp/it's here",
            "/tmp/$HOME `x` \"y\"",
            "/ü",
        ] {
            let line = format!("printf %s {}", quoted(Path::new(path)));
            let output = Command::new("sh").args(["-c", &line]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), path);
        }
    }
}
