//! The log, written by a thread of its own: the disk or the console behind the log may stand still, and an agent that
//! waited for it would not answer heartbeats.

use std::io::Write;

use kmorph_launch::AgentConfig;
use slog::{Drain, Logger, o};
use slog_async::{Async, AsyncGuard, OverflowStrategy};

/// Lines that may wait to be written; further ones are dropped, and how many is logged when there is room.
const LINES_MAX: usize = 1024;

/// The logger, and what waits, when it is dropped, until all lines are written.
pub(crate) fn logger(
    config: &AgentConfig,
    to: impl Write + Send + 'static,
) -> (Logger, AsyncGuard) {
    let decorator = slog_term::PlainSyncDecorator::new(to);
    let drain = slog_term::FullFormat::new(decorator)
        .use_utc_timestamp()
        .build();
    // A failed write is ignored: there is nowhere to report it.
    let (drain, written) = Async::new(drain.ignore_res())
        .thread_name("log".to_owned())
        .chan_size(LINES_MAX)
        .overflow_strategy(OverflowStrategy::DropAndReport)
        .build_with_guard();
    let name = config.instance.to_string();
    let values = o!("instance" => name, "generation" => config.generation);
    (Logger::root(drain.ignore_res(), values), written)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::mpsc::{Receiver, channel};

    use slog::info;

    use super::*;

    /// A disk that stands still until it is told to go on.
    struct Still(Receiver<()>, Vec<u8>);

    impl Write for Still {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn whoever_logs_does_not_wait_for_the_disk() {
        let config = serde_json::json!({
            "instance": "web", "generation": 7, "role": "child", "cpus": [], "memory_bytes": 0, "ports": [],
            "key": "00".repeat(32), "start": { "kind": "fresh" },
            "listen": { "kind": "unix", "path": "/nonexistent/vsock.sock", "port": 9000 },
        });
        let config: AgentConfig = serde_json::from_value(config).unwrap();
        let (go_on, still) = channel();
        let (log, written) = logger(&config, Still(still, Vec::new()));
        // More than may wait: this thread would never come to the end.
        for n in 0..2 * LINES_MAX {
            info!(log, "line"; "n" => n);
        }
        drop(go_on);
        drop((log, written));
    }
}
