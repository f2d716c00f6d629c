//! Tasks and their stacks, read with drgn, which needs the kernel's vmlinux with debug information.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::build_id;
use crate::error::DumpError;

/// Maximum size of drgn's answer, bytes.
const ANSWER_MAX_BYTES: u64 = 64 << 20;
/// Maximum number of characters of drgn's error that are shown.
const COMPLAINT_MAX_CHARS: usize = 400;

/// The script for drgn.
const SCRIPT: &str = r#"
import json
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import task_state_to_char, task_cpu
def place(frame):
    try:
        symbol = frame.symbol()
    except LookupError:
        return hex(frame.pc)
    place = f"{symbol.name}+{hex(frame.pc - symbol.address)}"
    return f"{frame.name}, inlined in {place}" if frame.is_inline else place
for task in for_each_task(prog):
    try:
        frames = [place(frame) for frame in prog.stack_trace(task)]
    except Exception as error:
        frames = [f"no stack: {error}"]
    print(json.dumps({
        "pid": task.pid.value_(),
        "comm": task.comm.string_().decode(errors="replace"),
        "state": task_state_to_char(task),
        "cpu": task_cpu(task),
        "stack": frames,
    }))
"#;

/// One task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its pid.
    pub pid: i64,
    /// Its name.
    pub comm: String,
    /// Its state, as one letter: R runs, S sleeps, D waits for a device …
    pub state: String,
    /// The CPU on which it last ran.
    pub cpu: i64,
    /// The functions on its stack, innermost first, each with the offset in it; an address without a known function,
    /// as in a program.
    pub stack: Vec<String>,
}

/// Why there are no tasks.
#[derive(Debug, thiserror::Error)]
pub enum TasksError {
    /// The program is not installed.
    #[error("tasks and stacks are read with drgn, which is not installed: `pip install drgn`")]
    NoDrgn,
    /// The image belongs to another build of the kernel.
    #[error(
        "{vmlinux:?} is the image of another kernel: its build id is {found}, and that of the kernel in the dump \
         is {wanted}; `debuginfod-find debuginfo {wanted}` or the distribution's debug package has the right one"
    )]
    OtherBuild {
        /// The image.
        vmlinux: PathBuf,
        /// Its build id, hexadecimal.
        found: String,
        /// The build id in VMCOREINFO, hexadecimal.
        wanted: String,
    },
    /// The image cannot be read.
    #[error("reading {vmlinux:?}: {source}")]
    Image {
        /// The image.
        vmlinux: PathBuf,
        /// The reason.
        source: DumpError,
    },
    /// drgn cannot be started, or its answer cannot be read.
    #[error("running drgn: {0}")]
    Run(#[from] std::io::Error),
    /// drgn failed.
    #[error("drgn failed: {0}")]
    Failed(String),
    /// drgn's answer has another format.
    #[error("cannot parse drgn's output: {0}")]
    Answer(#[from] serde_json::Error),
}

/// Asks drgn (from `PATH`) for the tasks in the dump at `core`. `vmlinux` is the kernel's image with debug
/// information; `build_id` is the kernel's, in hexadecimal digits, if known. Takes seconds: drgn reads the whole
/// image.
///
/// # Errors
///
/// If the image is of another build, or drgn is missing or fails, with its output. An image without a build id is
/// accepted.
pub fn tasks(core: &Path, vmlinux: &Path, build_id: Option<&str>) -> Result<Vec<Task>, TasksError> {
    let found = build_id::of_file(vmlinux).map_err(|source| TasksError::Image {
        vmlinux: vmlinux.to_owned(),
        source,
    })?;
    if let (Some(found), Some(wanted)) = (found, build_id)
        && !found.eq_ignore_ascii_case(wanted)
    {
        return Err(TasksError::OtherBuild {
            vmlinux: vmlinux.to_owned(),
            found,
            wanted: wanted.to_owned(),
        });
    }
    let mut drgn = Command::new("drgn")
        .args(["--quiet", "--core"])
        .arg(core)
        .arg("--symbols")
        .arg(vmlinux)
        .args(["-e", SCRIPT])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => TasksError::NoDrgn,
            _ => TasksError::Run(error),
        })?;
    let complaint = drgn.stderr.take().map(|mut pipe| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.by_ref().take(ANSWER_MAX_BYTES).read_to_end(&mut text);
            text
        })
    });
    let mut answer = String::new();
    let read = drgn
        .stdout
        .take()
        .map(|pipe| pipe.take(ANSWER_MAX_BYTES).read_to_string(&mut answer));
    let status = drgn.wait()?;
    let complaint = complaint
        .and_then(|thread| thread.join().ok())
        .unwrap_or_default();
    if !status.success() {
        let text = String::from_utf8_lossy(&complaint).trim().to_owned();
        let skipped = text.chars().count().saturating_sub(COMPLAINT_MAX_CHARS);
        return Err(TasksError::Failed(text.chars().skip(skipped).collect()));
    }
    read.transpose()?;
    let lines = answer.lines().filter(|line| !line.is_empty());
    Ok(lines.map(serde_json::from_str).collect::<Result<_, _>>()?)
}
