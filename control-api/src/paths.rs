//! Default paths of kmorphd's files, shared by kmorphd and kmorphctl.
//!
//! | | root | other users |
//! |---|---|---|
//! | configuration | `/etc/kmorph/kmorphd.conf` | `$XDG_CONFIG_HOME/kmorph/kmorphd.conf`, else `~/.config/kmorph/kmorphd.conf` |
//! | state directory | `/var/lib/kmorph` | `$XDG_STATE_HOME/kmorph`, else `~/.local/state/kmorph` |
//! | cache directory | `/var/cache/kmorph` | `$XDG_CACHE_HOME/kmorph`, else `~/.cache/kmorph` |
//! | runtime directory | `/run/kmorph` | `$XDG_RUNTIME_DIR/kmorph`, else `/tmp/kmorph-<uid>` |
//!
//! The socket is `kmorphd.sock` in the runtime directory. Without a home directory, configuration, state and cache
//! are under `/tmp/kmorph-<uid>`. As the XDG rules say, a variable that is empty or not an absolute path counts as
//! unset. A directory under `/tmp` must be created with mode 0700, and refused if another user owns it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Environment variable with the path of the daemon's socket, for both programs; `--socket` overrides it.
pub const SOCKET_ENV: &str = "KMORPH_SOCKET";
/// Name of the control socket in the runtime directory.
pub const SOCKET_NAME: &str = "kmorphd.sock";
/// Name of the configuration file.
pub const CONFIG_NAME: &str = "kmorphd.conf";
/// Name, in the state directory, of the log of a daemon started by `kmorphctl daemon start`.
pub const LOG_NAME: &str = "kmorphd.log";

/// Name of the journal in the state directory.
pub const JOURNAL_NAME: &str = "journal.sqlite";
/// Files that identify a state directory.
pub const STATE_MARKS: [&str; 2] = [JOURNAL_NAME, LOG_NAME];

/// Maximum size of a configuration file, bytes.
pub const CONFIG_MAX_BYTES: u64 = 1 << 20;

/// The part of a configuration file's `[paths]` that a client needs. The daemon checks whether the file is valid.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ConfiguredPaths {
    /// The control socket.
    pub socket: Option<PathBuf>,
    /// The runtime directory.
    pub run_dir: Option<PathBuf>,
    /// The state directory.
    pub state_dir: Option<PathBuf>,
}

impl ConfiguredPaths {
    /// Parses the text of a configuration file; the result is empty if the text is invalid.
    pub fn parse(text: &str) -> Self {
        #[derive(Default, Deserialize)]
        struct Config {
            #[serde(default)]
            paths: ConfiguredPaths,
        }
        toml::from_str::<Config>(text).unwrap_or_default().paths
    }

    /// Returns the control socket, if the file determines it.
    pub fn socket(&self) -> Option<PathBuf> {
        let in_run_dir = || self.run_dir.as_ref().map(|dir| dir.join(SOCKET_NAME));
        self.socket.clone().or_else(in_run_dir)
    }
}

/// The default places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultPaths {
    /// The configuration file.
    pub config: PathBuf,
    /// The state directory: journal, log.
    pub state_dir: PathBuf,
    /// The cache directory: guest images, and files fetched by the scripts. It can be deleted at any time.
    pub cache_dir: PathBuf,
    /// The runtime directory: sockets, one directory per instance.
    pub run_dir: PathBuf,
}

impl DefaultPaths {
    /// Returns the default paths for a user (effective uid); `var` looks up the environment:
    /// `DefaultPaths::of(uid, |name| std::env::var_os(name))`.
    pub fn of(uid: u32, var: impl Fn(&str) -> Option<OsString>) -> Self {
        if uid == 0 {
            return Self {
                config: Path::new("/etc/kmorph").join(CONFIG_NAME),
                state_dir: PathBuf::from("/var/lib/kmorph"),
                cache_dir: PathBuf::from("/var/cache/kmorph"),
                run_dir: PathBuf::from("/run/kmorph"),
            };
        }
        let directory = |name: &str| {
            let path = PathBuf::from(var(name)?);
            path.is_absolute().then_some(path)
        };
        let last_resort = PathBuf::from(format!("/tmp/kmorph-{uid}"));
        let home = directory("HOME");
        let under = |name: &str, in_home: &str, without_home: &str| {
            directory(name)
                .or_else(|| home.as_ref().map(|home| home.join(in_home)))
                .map_or_else(|| last_resort.join(without_home), |dir| dir.join("kmorph"))
        };
        Self {
            config: under("XDG_CONFIG_HOME", ".config", "config").join(CONFIG_NAME),
            state_dir: under("XDG_STATE_HOME", ".local/state", "state"),
            cache_dir: under("XDG_CACHE_HOME", ".cache", "cache"),
            run_dir: directory("XDG_RUNTIME_DIR")
                .map_or_else(|| last_resort.clone(), |dir| dir.join("kmorph")),
        }
    }

    /// Returns the control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join(SOCKET_NAME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configured_socket_goes_before_one_in_a_configured_directory() {
        let socket = |text: &str| ConfiguredPaths::parse(text).socket();
        let both = "backend = \"qemu\"\n[paths]\nrun_dir = \"/r\"\nsocket = \"/s\"\n";
        assert_eq!(socket(both), Some("/s".into()));
        assert_eq!(
            socket("[paths]\nrun_dir = \"/r\"\n"),
            Some("/r/kmorphd.sock".into())
        );
        for nothing in ["", "[paths", "[paths]\nsocket = 1\n"] {
            assert_eq!(socket(nothing), None, "{nothing}");
        }
    }

    fn paths(uid: u32, vars: &[(&str, &str)]) -> DefaultPaths {
        DefaultPaths::of(uid, |name| {
            let (_, value) = vars.iter().find(|(key, _)| *key == name)?;
            Some(OsString::from(value))
        })
    }

    #[test]
    fn root_uses_the_system_directories_whatever_the_environment_says() {
        let root = paths(0, &[("XDG_RUNTIME_DIR", "/run/user/0"), ("HOME", "/root")]);
        assert_eq!(root.socket(), Path::new("/run/kmorph/kmorphd.sock"));
        assert_eq!(root.config, Path::new("/etc/kmorph/kmorphd.conf"));
        assert_eq!(root.state_dir, Path::new("/var/lib/kmorph"));
    }

    #[test]
    fn a_user_uses_the_xdg_directories() {
        let user = paths(
            1000,
            &[
                ("XDG_RUNTIME_DIR", "/run/user/1000"),
                ("XDG_CONFIG_HOME", "/c"),
                ("XDG_STATE_HOME", "/s"),
                ("HOME", "/home/u"),
            ],
        );
        assert_eq!(
            user.socket(),
            Path::new("/run/user/1000/kmorph/kmorphd.sock")
        );
        assert_eq!(user.config, Path::new("/c/kmorph/kmorphd.conf"));
        assert_eq!(user.state_dir, Path::new("/s/kmorph"));
    }

    #[test]
    fn relative_and_empty_variables_count_as_not_set() {
        let user = paths(
            1000,
            &[
                ("XDG_RUNTIME_DIR", ""),
                ("XDG_STATE_HOME", "s"),
                ("HOME", "/home/u"),
            ],
        );
        assert_eq!(user.socket(), Path::new("/tmp/kmorph-1000/kmorphd.sock"));
        assert_eq!(user.state_dir, Path::new("/home/u/.local/state/kmorph"));
        assert_eq!(
            user.config,
            Path::new("/home/u/.config/kmorph/kmorphd.conf")
        );
    }

    #[test]
    fn without_a_home_everything_is_under_tmp() {
        let nobody = paths(65534, &[]);
        assert_eq!(nobody.socket(), Path::new("/tmp/kmorph-65534/kmorphd.sock"));
        assert_eq!(nobody.state_dir, Path::new("/tmp/kmorph-65534/state"));
        assert_eq!(
            nobody.config,
            Path::new("/tmp/kmorph-65534/config/kmorphd.conf")
        );
    }
}
