//! Checks of the owner and the permissions of directories and files.

use std::path::Path;

use rustix::fs::{FileType, Stat};
use rustix::process::{getegid, geteuid};

use crate::Refusal;

/// Write permission for group and others.
const WRITE_OF_OTHERS: u32 = 0o022;
/// Write permission for everybody.
const WRITE_OF_ALL: u32 = 0o002;
/// Read permission for group and others.
const READ_OF_OTHERS: u32 = 0o044;
/// Read permission for everybody.
const READ_OF_ALL: u32 = 0o004;
/// In a directory with this bit, only its owner renames or removes an entry.
const STICKY: u32 = 0o1000;
/// All permission bits.
pub(crate) const PERMISSIONS: u32 = 0o7777;

pub(crate) fn own_uid() -> u32 {
    geteuid().as_raw()
}

/// Whether users other than root and this one can rename entries of a directory, whatever the sticky bit says. Root's
/// groups and this user's private group (same number as the user) do not count as others.
pub(crate) fn others_can_write(stat: &Stat) -> bool {
    let private_group = stat.st_gid == getegid().as_raw() && stat.st_gid == own_uid();
    let trusted_group = stat.st_uid == 0 || private_group;
    let forbidden = if trusted_group {
        WRITE_OF_ALL
    } else {
        WRITE_OF_OTHERS
    };
    stat.st_mode & forbidden != 0
}

/// A directory on the way: root's or this user's; where others can write, only with the sticky bit, under which
/// they cannot replace what belongs to root or this user.
pub(crate) fn on_the_way(stat: &Stat, path: &Path) -> Result<(), Refusal> {
    let own = own_uid();
    if stat.st_uid != 0 && stat.st_uid != own {
        return Err(owner(stat, path));
    }
    if others_can_write(stat) && stat.st_mode & STICKY == 0 {
        return Err(writable(stat, path));
    }
    Ok(())
}

/// Checks a directory of the daemon: it must belong to this user, and no one else may write to it.
pub(crate) fn own_directory(stat: &Stat, path: &Path) -> Result<(), Refusal> {
    if stat.st_uid != own_uid() {
        return Err(owner(stat, path));
    }
    if others_can_write(stat) {
        return Err(writable(stat, path));
    }
    Ok(())
}

/// A file of the daemon's own: regular, this user's, under one name.
pub(crate) fn own_file(stat: &Stat, path: &Path) -> Result<(), Refusal> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return Err(Refusal::Type {
            path: path.to_owned(),
            found: describe(kind),
            wanted: "a regular file",
        });
    }
    if stat.st_uid != own_uid() {
        return Err(owner(stat, path));
    }
    if stat.st_nlink > 1 {
        return Err(Refusal::Links {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Checks a file with secrets: a regular file of root or this user that no one else can read or write. If it belongs
/// to root and this user is not root, this user reads it through its group.
pub(crate) fn secret_file(stat: &Stat, path: &Path) -> Result<(), Refusal> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return Err(Refusal::Type {
            path: path.to_owned(),
            found: describe(kind),
            wanted: "a regular file",
        });
    }
    let own = own_uid();
    if stat.st_uid != 0 && stat.st_uid != own {
        return Err(owner(stat, path));
    }
    if stat.st_mode & WRITE_OF_OTHERS != 0 {
        return Err(writable(stat, path));
    }
    let forbidden = if stat.st_uid == own {
        READ_OF_OTHERS
    } else {
        READ_OF_ALL
    };
    if stat.st_mode & forbidden != 0 {
        return Err(Refusal::Readable {
            path: path.to_owned(),
            mode: stat.st_mode & PERMISSIONS,
        });
    }
    Ok(())
}

fn owner(stat: &Stat, path: &Path) -> Refusal {
    Refusal::Owner {
        path: path.to_owned(),
        owner: stat.st_uid,
        own: own_uid(),
    }
}

fn writable(stat: &Stat, path: &Path) -> Refusal {
    Refusal::Writable {
        path: path.to_owned(),
        mode: stat.st_mode & PERMISSIONS,
    }
}

/// A file type, in words.
pub(crate) fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "of an unknown type",
    }
}
