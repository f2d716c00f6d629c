//! Reasons for refusing a path of the daemon's own files, or of a file with secrets.

use std::io;
use std::path::PathBuf;

/// Why a path of the daemon's own, or one with secrets, is not used. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The path does not begin at `/`.
    #[error("{path:?} is not an absolute path; use one that begins with /")]
    NotAbsolute {
        /// The path.
        path: PathBuf,
    },
    /// A symbolic link, where somebody else could have planted it.
    #[error(
        "{path:?} is a symbolic link, and another user could have planted it; remove the link, or use the path that it \
         leads to"
    )]
    Symlink {
        /// The link.
        path: PathBuf,
    },
    /// Following links does not end.
    #[error("{path:?}: too many symbolic links; use the path of the directory itself")]
    TooManySymlinks {
        /// The path asked for.
        path: PathBuf,
    },
    /// Another user owns it.
    #[error(
        "{path:?} belongs to uid {owner}, not to uid {own}, who could change it at any time; remove it, give it to \
         uid {own} (chown) after looking through it, or name another place"
    )]
    Owner {
        /// The path.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The required owner.
        own: u32,
    },
    /// Other users can write to it.
    #[error(
        "other users can write to {path:?} (mode {mode:04o}); inspect it, then remove that permission (chmod go-w), or \
         use another path"
    )]
    Writable {
        /// The path.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Other users can read it, and it holds secrets.
    #[error(
        "other users can read {path:?} (mode {mode:04o}), which holds secrets; remove that permission (chmod go-r) and change \
         the secrets they may have seen"
    )]
    Readable {
        /// The path.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file exceeds the size limit.
    #[error("{path:?} is larger than {max_bytes} bytes; use a smaller file")]
    TooLarge {
        /// The path.
        path: PathBuf,
        /// The bound, bytes.
        max_bytes: u64,
    },
    /// Others can look into it, and what is in it is not the daemon's.
    #[error(
        "{path:?} holds files of something else and would have to be closed to other users; use a separate directory"
    )]
    Strange {
        /// The path.
        path: PathBuf,
    },
    /// The path has an unexpected type.
    #[error("{path:?} is {found}, not {wanted}; remove it, or use another path")]
    Type {
        /// The path.
        path: PathBuf,
        /// Its type, with an article.
        found: &'static str,
        /// The required type, with an article.
        wanted: &'static str,
    },
    /// The file has further names, which others may use.
    #[error("{path:?} has other hard links; remove it, the other links stay")]
    Links {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{what} {path:?}: {source}")]
    System {
        /// The attempted action.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        let kind = match &refusal {
            Refusal::System { source, .. } => source.kind(),
            _ => io::ErrorKind::PermissionDenied,
        };
        Self::new(kind, refusal)
    }
}
