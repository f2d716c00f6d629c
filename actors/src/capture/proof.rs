//! Checks on a running kernel that its vmcore would be readable: a broken dump is found at the kernel update and not
//! at the crash.
//!
//! Nothing is frozen or written: the memory is read as it is.

use crate::model::EventKind;
use kmorph_backends::contract::MemoryRange;
use kmorph_vmcore::analysis::shortfalls;
use slog::{info, warn};
use tokio::sync::oneshot;

use super::{CAPTURE_NICE, CaptureError, Captures, open};
use crate::model::generation::AnyGeneration;
use crate::platform::ambient;
use crate::platform::events::Draft;

/// Begins to read the memory of a generation that has just taken over, if the backend captures memory. Publishes the
/// gaps of its vmcore as an event.
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
        let found = match map {
            Ok(map) if map.is_empty() => Ok(Vec::new()),
            Ok(map) => read(map).await,
            Err(error) => Err(CaptureError::Memory(error.to_string())),
        };
        let found = found.unwrap_or_else(|error| vec![error.to_string()]);
        tell(&captures, &row, &found);
    });
}

/// Returns the gaps of a vmcore of this memory. A separate thread reads it, because the thread keeps the low priority
/// that is set here.
async fn read(map: Vec<MemoryRange>) -> Result<Vec<String>, CaptureError> {
    let (told, found) = oneshot::channel();
    let work = move || {
        let _ = told.send(open(&map).map(|memory| shortfalls(&memory)));
    };
    ambient::thread("vmcore-proof", Some(CAPTURE_NICE), work)
        .map_err(|error| CaptureError::Memory(format!("no thread for it: {error}")))?;
    found.await.unwrap_or(Err(CaptureError::Fault))
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

/// Reported for a kernel whose vmcore has no gaps.
const PROVEN: &str = "a vmcore of its new kernel could be read whole";
