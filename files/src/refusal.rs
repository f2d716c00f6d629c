//! Why a path of the daemon's own, or one with secrets, is not used.

use std::io;
use std::path::PathBuf;

/// Why a path of the daemon's own, or one with secrets, is not used. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The path does not begin at `/`.
    #[error("{path:?} is not an absolute path; name one that begins with /")]
    NotAbsolute {
        /// The path.
        path: PathBuf,
    },
    /// A symbolic link, where somebody else could have planted it.
    #[error(
        "{path:?} is a symbolic link, and another user could have planted it; remove the link, or name what it \
         leads to"
    )]
    Symlink {
        /// The link.
        path: PathBuf,
    },
    /// Following links does not end.
    #[error("{path:?}: too many symbolic links; name the directory that they lead to")]
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
        /// What was looked at.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who should.
        own: u32,
    },
    /// Other users can write to it.
    #[error(
        "other users can write to {path:?} (mode {mode:04o}); look through it, then take that away (chmod go-w), or \
         name another place"
    )]
    Writable {
        /// What was looked at.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Other users can read it, and it holds secrets.
    #[error(
        "other users can read {path:?} (mode {mode:04o}), which holds secrets; take that away (chmod go-r) and change \
         what they may have seen"
    )]
    Readable {
        /// What was looked at.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is larger than its bound.
    #[error("{path:?} is larger than {max_bytes} bytes; name a smaller file")]
    TooLarge {
        /// What was looked at.
        path: PathBuf,
        /// The bound, bytes.
        max_bytes: u64,
    },
    /// Others can look into it, and what is in it is not the daemon's.
    #[error(
        "{path:?} holds files of something else, and would have to be closed to other users; name a directory of its own"
    )]
    Strange {
        /// What was looked at.
        path: PathBuf,
    },
    /// It is something else than expected.
    #[error("{path:?} is {found}, not {wanted}; remove it, or name another place")]
    Type {
        /// What was looked at.
        path: PathBuf,
        /// What it is, with an article.
        found: &'static str,
        /// What it should be, with an article.
        wanted: &'static str,
    },
    /// The file has further names, which others may use.
    #[error("{path:?} has further names (hard links); remove it, the other names stay")]
    Links {
        /// What was looked at.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{what} {path:?}: {source}")]
    System {
        /// What was tried.
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
