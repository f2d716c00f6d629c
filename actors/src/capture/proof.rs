//! Proves that a vmcore of a kernel could be read, while the kernel runs: an update that breaks dumps is found at the
//! update, not at the crash.
//!
//! Nothing is frozen or written: the memory is read as it is.

use crate::model::EventKind;
use kmorph_vmcore::analysis::shortfalls;
use slog::{info, warn};

use super::{CAPTURE_NICE, CaptureError, Captures, open};
use crate::model::generation::AnyGeneration;
use crate::platform::events::Draft;

/// Begins to read the memory of a generation that has just taken over, where the backend captures memory. What a vmcore
/// of the generation could not tell is told as an event.
pub(crate) fn begin(captures: &Captures, row: &AnyGeneration) {
    let Some(placement) = row.placement().cloned() else {
        return;
    };
    if !captures
        .generations
        .machine
        .backend
        .kind()
        .captures_memory()
    {
        return;
    }
    let (captures, row) = (captures.clone(), row.clone());
    actix::spawn(async move {
        let map = captures
            .generations
            .machine
            .backend
            .memory_map(&placement)
            .await;
        let read = tokio::task::spawn_blocking(move || {
            let map = map.map_err(|error| CaptureError::Memory(error.to_string()))?;
            if map.is_empty() {
                return Ok(Vec::new());
            }
            standing_back(move || open(&map).map(|memory| shortfalls(&memory)))
        });
        let found = match read.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => vec![error.to_string()],
            Err(_) => vec![CaptureError::Fault.to_string()],
        };
        tell(&captures, &row, &found);
    });
}

/// Does `work` on a thread of its own, because a thread keeps the low priority that this one is given.
fn standing_back<T: Send>(
    work: impl FnOnce() -> Result<T, CaptureError> + Send,
) -> Result<T, CaptureError> {
    std::thread::scope(|scope| {
        let own = scope.spawn(|| {
            let _ = rustix::process::setpriority_process(None, CAPTURE_NICE);
            work()
        });
        own.join().unwrap_or(Err(CaptureError::Fault))
    })
}

fn tell(captures: &Captures, row: &AnyGeneration, found: &[String]) {
    let text = match found {
        [] => PROVEN.to_owned(),
        found => format!(
            "a vmcore of its new kernel could not be read whole: {}; `kmorphctl doctor --kernel={}` tries it",
            found.join("; "),
            row.kernel.path.display()
        ),
    };
    match found {
        [] => info!(captures.platform.log, "{}", text; "instance" => &row.instance,
            "generation" => row.generation),
        _ => warn!(captures.platform.log, "{}", text; "instance" => &row.instance,
            "generation" => row.generation),
    }
    let draft = Draft::of(EventKind::Vmcore, &row.instance, row.generation, text);
    captures.platform.events.publish(draft);
}

/// What is told of a kernel whose vmcore lacks nothing.
const PROVEN: &str = "a vmcore of its new kernel could be read whole";
