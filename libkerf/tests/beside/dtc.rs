//! The real dtc, one process for each tree.

use std::io::Write;
use std::process::{Command, Stdio};

/// Returns the bytes that dtc makes of an input in this format (`dts` or `dtb`); `None` if dtc refuses the input.
pub(crate) fn compiled(format: &str, input: &[u8]) -> Option<Vec<u8>> {
    let mut dtc = Command::new("dtc")
        .args(["-q", "-q", "-I", format, "-O", "dtb"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("dtc is installed by scripts/setup");
    let mut stdin = dtc.stdin.take().unwrap();
    // The input fits in the pipe (64 KiB), so that this write never waits for dtc.
    stdin.write_all(input).unwrap();
    drop(stdin);
    let output = dtc.wait_with_output().unwrap();
    output.status.success().then_some(output.stdout)
}
