//! Cleans up after a test: `kmorph-test-guard <directory>` waits until its standard input closes, kills every process
//! that names the directory in its command line or environment or is in a cgroup of a daemon below the directory,
//! unmounts every mount below the directory, and removes the directory.

use std::io::Read;
use std::path::Path;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn main() {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: kmorph-test-guard <directory>");
        return;
    };
    let dir = Path::new(&dir);
    // Ctrl-C reaches the whole process group; this process must survive to clean up.
    let _ = nix::unistd::setsid();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    while kill_all(dir) > 0 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    kmorph_backends::cgroup::end_all_below(dir);
    unmount_all(dir);
    let _ = std::fs::remove_dir_all(dir);
}

/// Unmounts the mounts that a killed keeper of files left. Field 5 of a line is the mount point
/// (proc_pid_mountinfo(5)).
fn unmount_all(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for place in places.filter(|place| Path::new(place).starts_with(dir)) {
        let _ = umount2(place, MntFlags::MNT_DETACH);
    }
}

fn kill_all(dir: &Path) -> usize {
    let own = std::process::id();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return 0;
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut killed = 0;
    for pid in pids.filter(|pid| *pid != own) {
        let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        if belongs_to(dir, &read("cmdline"), &read("environ")) {
            let pid = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
            killed += usize::from(kill(pid, Signal::SIGKILL).is_ok());
        }
    }
    killed
}

fn belongs_to(dir: &Path, cmdline: &[u8], environ: &[u8]) -> bool {
    let dir = dir.as_os_str().as_encoded_bytes();
    let names = |text: &[u8]| text.windows(dir.len()).any(|part| part == dir);
    names(cmdline) || names(environ)
}
