//! The paths of the daemon: its socket, its configuration, the log of its start.

use std::path::{Path, PathBuf};

use kmorph_control_api::paths::{
    CONFIG_MAX_BYTES, ConfiguredPaths, DefaultPaths, LOG_NAME, SOCKET_ENV,
};

/// The places of one daemon.
#[derive(Debug)]
pub(crate) struct Places {
    /// Path of its control socket.
    pub(crate) socket: PathBuf,
    /// Default log file of `daemon start`.
    pub(crate) log: PathBuf,
    /// Whether the default socket is used: its daemon must then belong to this user or root.
    pub(crate) socket_is_default: bool,
    /// True if the socket was given on the command line or in the environment.
    pub(crate) socket_was_named: bool,
}

impl Places {
    /// Returns the places of this user's daemon. `socket` and `config` (the configuration file) are
    /// from the command line.
    pub(crate) fn find(socket: Option<PathBuf>, config: Option<&Path>) -> Self {
        let uid = nix::unistd::geteuid().as_raw();
        let var = |name: &str| std::env::var_os(name);
        let defaults = DefaultPaths::of(uid, var);
        let configured = read(config.unwrap_or(&defaults.config));
        let named = socket.or_else(|| {
            var(SOCKET_ENV)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        });
        let socket_was_named = named.is_some();
        Self::choose(&defaults, configured, named, socket_was_named)
    }

    fn choose(
        defaults: &DefaultPaths,
        configured: ConfiguredPaths,
        named: Option<PathBuf>,
        socket_was_named: bool,
    ) -> Self {
        let chosen = named.or_else(|| configured.socket());
        let socket_is_default = chosen.is_none();
        let socket = chosen.unwrap_or_else(|| defaults.socket());
        let state_dir = configured
            .state_dir
            .unwrap_or_else(|| defaults.state_dir.clone());
        Self {
            socket,
            log: state_dir.join(LOG_NAME),
            socket_is_default,
            socket_was_named,
        }
    }
}

/// Returns the paths in a configuration file; empty if it cannot be read or parsed.
fn read(path: &Path) -> ConfiguredPaths {
    let bytes = kmorph_files::read_named(path, CONFIG_MAX_BYTES).unwrap_or_default();
    let text = String::from_utf8(bytes).unwrap_or_default();
    ConfiguredPaths::parse(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_names_the_socket() {
        let defaults = DefaultPaths::of(0, |_| None);
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("kmorphd.conf");
        let socket = |named: Option<&str>, text: &str| {
            std::fs::write(&config, text).unwrap();
            let named = named.map(PathBuf::from);
            Places::choose(&defaults, read(&config), named, false).socket
        };
        let both = "backend = \"qemu\"\n[paths]\nrun_dir = \"/r\"\nsocket = \"/s\"\n";
        assert_eq!(socket(Some("/n"), both), Path::new("/n"));
        assert_eq!(socket(None, both), Path::new("/s"));
        assert_eq!(
            socket(None, "[paths]\nrun_dir = \"/r\"\n"),
            Path::new("/r/kmorphd.sock")
        );
        for nothing in ["", "[paths", "[paths]\nsocket = 1\n"] {
            assert_eq!(socket(None, nothing), defaults.socket());
        }
    }
}
