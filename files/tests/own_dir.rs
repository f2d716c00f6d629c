//! What another user may have planted on the way to the daemon's files is refused.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use kmorph_files::{OwnDir, PRIVATE_DIR, PRIVATE_FILE, Refusal};
use rustix::fs::Mode;
use tempfile::TempDir;

/// A user that owns nothing of ours.
const SOMEBODY: u32 = 65_534;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn may_give_away() -> bool {
    rustix::process::geteuid().is_root()
}

fn place() -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    // Compared with paths that have no symbolic links.
    let path = dir.path().canonicalize().unwrap();
    (dir, path)
}

fn private(path: &Path) -> Result<OwnDir, Refusal> {
    OwnDir::make(path, PRIVATE_DIR)
}

#[test]
fn what_others_could_read_is_mended() {
    let (_dir, place) = place();
    let state = place.join("state");
    fs::create_dir_all(state.join("vmcore")).unwrap();
    for name in ["journal.sqlite", "journal.sqlite-wal", "kmorphd.log"] {
        fs::write(state.join(name), "secret").unwrap();
        set_mode(&state.join(name), 0o644);
    }
    set_mode(&state, 0o755);
    set_mode(&state.join("vmcore"), 0o755);
    private(&state).unwrap().mend().unwrap();
    assert_eq!(mode(&state), PRIVATE_DIR);
    assert_eq!(mode(&state.join("vmcore")), PRIVATE_DIR);
    for name in ["journal.sqlite", "journal.sqlite-wal", "kmorphd.log"] {
        assert_eq!(mode(&state.join(name)), PRIVATE_FILE, "{name}");
        assert_eq!(fs::read(state.join(name)).unwrap(), b"secret");
    }
}

#[test]
fn a_directory_with_files_of_something_else_is_not_taken_from_others() {
    let (_dir, place) = place();
    let named = place.join("lib");
    fs::create_dir(&named).unwrap();
    set_mode(&named, 0o755);
    fs::write(named.join("something"), "").unwrap();
    let refused = OwnDir::make_private(&named, &["journal.sqlite"]).unwrap_err();
    assert!(matches!(refused, Refusal::Strange { .. }), "{refused}");
    assert_eq!(mode(&named), 0o755);
    fs::write(named.join("journal.sqlite"), "").unwrap();
    OwnDir::make_private(&named, &["journal.sqlite"]).unwrap();
    assert_eq!(mode(&named), PRIVATE_DIR);
}

#[test]
fn a_directory_that_is_narrower_than_asked_for_stays_so() {
    let (_dir, place) = place();
    let run = place.join("run");
    fs::create_dir(&run).unwrap();
    set_mode(&run, 0o710);
    OwnDir::make(&run, 0o755).unwrap();
    assert_eq!(mode(&run), 0o710);
}

#[test]
fn a_planted_symlink_is_refused_and_its_target_stays() {
    let (_dir, place) = place();
    let target = place.join("target");
    fs::write(&target, "precious").unwrap();
    set_mode(&target, 0o640);
    let dir = private(&place.join("dir")).unwrap();
    symlink(&target, dir.path().join("agent.json")).unwrap();
    let attempts = [
        dir.write("agent.json", b"new"),
        dir.file("agent.json").map(drop),
        dir.append("agent.json").map(drop),
        dir.empty_file("agent.json").map(drop),
        dir.mend(),
    ];
    for attempt in attempts {
        assert!(
            matches!(attempt, Err(Refusal::Symlink { .. })),
            "{attempt:?}"
        );
    }
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    assert_eq!(mode(&target), 0o640);
    // A dangling one makes nothing where it leads.
    let nowhere = place.join("nowhere");
    symlink(&nowhere, dir.path().join("lock")).unwrap();
    assert!(matches!(dir.file("lock"), Err(Refusal::Symlink { .. })));
    assert!(!nowhere.exists());
}

#[test]
fn a_symlink_where_everybody_can_write_is_refused_and_one_where_nobody_can_is_followed() {
    let (_dir, place) = place();
    let real = place.join("real");
    fs::create_dir(&real).unwrap();
    let everybodys = place.join("tmp");
    fs::create_dir(&everybodys).unwrap();
    set_mode(&everybodys, 0o1777);
    symlink(&real, everybodys.join("kmorph-0")).unwrap();
    for path in ["kmorph-0", "kmorph-0/state", "kmorph-0/../kmorph-0"] {
        let refused = private(&everybodys.join(path)).unwrap_err();
        assert!(matches!(refused, Refusal::Symlink { .. }), "{refused}");
    }
    assert!(fs::read_dir(&real).unwrap().next().is_none());
    // As /var/run is, and as an administrator moves a directory to a larger disk.
    symlink("real", place.join("moved")).unwrap();
    let made = private(&place.join("moved/./state/../state")).unwrap();
    assert_eq!(made.path(), real.join("state"));
    symlink("circle", place.join("circle")).unwrap();
    let refused = private(&place.join("circle")).unwrap_err();
    assert!(
        matches!(refused, Refusal::TooManySymlinks { .. }),
        "{refused}"
    );
}

#[test]
fn another_users_directory_and_file_are_refused() {
    if !may_give_away() {
        return;
    }
    let (_dir, place) = place();
    let everybodys = place.join("tmp");
    fs::create_dir(&everybodys).unwrap();
    set_mode(&everybodys, 0o1777);
    let theirs = everybodys.join("kmorph-0");
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(SOMEBODY), None).unwrap();
    for path in ["", "state", "instances/web/1"] {
        let refused = private(&theirs.join(path)).unwrap_err();
        let Refusal::Owner { owner, .. } = &refused else {
            panic!("{refused}");
        };
        assert_eq!(*owner, SOMEBODY);
        assert!(refused.to_string().contains("chown"), "{refused}");
    }
    assert!(OwnDir::shared(&theirs).is_err());
    let dir = private(&place.join("dir")).unwrap();
    fs::write(dir.path().join("lock"), "").unwrap();
    chown(dir.path().join("lock"), Some(SOMEBODY), None).unwrap();
    for refused in [dir.file("lock").map(drop), dir.mend()] {
        assert!(matches!(refused, Err(Refusal::Owner { .. })), "{refused:?}");
    }
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let (_dir, place) = place();
    let open = place.join("open");
    fs::create_dir(&open).unwrap();
    set_mode(&open, 0o777);
    for path in [open.clone(), open.join("state")] {
        let refused = private(&path).unwrap_err();
        assert!(matches!(refused, Refusal::Writable { .. }), "{refused}");
        assert!(refused.to_string().contains("chmod go-w"), "{refused}");
    }
    assert_eq!(mode(&open), 0o777, "what is refused stays as it is");
    // With the sticky bit it may be passed through, and shared, but is not the daemon's own.
    set_mode(&open, 0o1777);
    assert!(private(&open.join("state")).is_ok());
    assert!(OwnDir::shared(&open).is_ok());
    assert!(private(&open).is_err());
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    let (_dir, place) = place();
    let dir = private(&place.join("dir")).unwrap();
    let fifo = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.path().join("fifo"),
        rustix::fs::FileType::Fifo,
        fifo,
        0,
    )
    .unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    for name in ["fifo", "directory", "socket"] {
        for attempt in [dir.file(name), dir.append(name)] {
            let refused = attempt.unwrap_err();
            let text = refused.to_string();
            assert!(text.contains(name), "{text}");
        }
    }
    fs::write(place.join("file"), "").unwrap();
    let refused = private(&place.join("file/below")).unwrap_err();
    assert!(matches!(refused, Refusal::Type { .. }), "{refused}");
}

#[test]
fn a_file_with_a_second_name_is_refused() {
    let (_dir, place) = place();
    let precious = place.join("precious");
    fs::write(&precious, "precious").unwrap();
    let dir = private(&place.join("dir")).unwrap();
    fs::hard_link(&precious, dir.path().join("agent.log")).unwrap();
    let refused = dir.write("agent.log", b"").unwrap_err();
    assert!(matches!(refused, Refusal::Links { .. }), "{refused}");
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
}

#[test]
fn what_is_written_replaces_what_was_there_and_what_is_appended_does_not() {
    let (_dir, place) = place();
    let dir = private(&place.join("dir")).unwrap();
    dir.write("agent.json", b"a longer text").unwrap();
    dir.write("agent.json", b"short").unwrap();
    assert_eq!(fs::read(dir.path().join("agent.json")).unwrap(), b"short");
    for line in ["one\n", "two\n"] {
        let mut log = dir.append("agent.log").unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
    assert_eq!(
        fs::read(dir.path().join("agent.log")).unwrap(),
        b"one\ntwo\n"
    );
}

#[test]
fn a_relative_path_is_refused() {
    let refused = private(Path::new("state")).unwrap_err();
    assert!(matches!(refused, Refusal::NotAbsolute { .. }), "{refused}");
}
