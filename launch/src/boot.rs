//! Which boot of its kernel a process lives in: pids and start times mean nothing under another.

use std::io;

/// Where a kernel says it (proc_sys_kernel(5), random/boot_id).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The boot id of this process's kernel: a UUID in text, another one at each boot.
///
/// # Errors
/// The system's, with the name of the file.
pub fn boot_id() -> io::Result<String> {
    match std::fs::read_to_string(BOOT_ID) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => {
            let text = format!("reading the boot id, {BOOT_ID}: {error}");
            Err(io::Error::new(error.kind(), text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_the_same_each_time_and_a_uuid() {
        let id = boot_id().unwrap();
        assert_eq!(id, boot_id().unwrap());
        assert_eq!(id.len(), 36, "{id:?}");
        let parts: Vec<_> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
    }
}
