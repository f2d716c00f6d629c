//! The log: readable on a terminal, JSON or journald for machines.
//!
//! A separate thread writes the lines: the disk or pipe behind the log may block, but the thread that monitors every
//! instance must not. If [`LINES_MAX`] lines are queued, further lines are dropped, and their number is logged as
//! soon as there is room.

use slog::{Drain, LevelFilter, Logger, o};
use slog_async::{Async, AsyncGuard, OverflowStrategy};

use crate::config::{Format, Level, Log};

/// Lines that may wait to be written.
const LINES_MAX: usize = 8192;

/// The root logger, and what waits, when it is dropped, until all lines are written.
pub(crate) fn logger(log: &Log) -> (Logger, AsyncGuard) {
    let level = match log.level {
        Level::Error => slog::Level::Error,
        Level::Warning => slog::Level::Warning,
        Level::Info => slog::Level::Info,
        Level::Debug => slog::Level::Debug,
    };
    match log.format {
        Format::Terminal => {
            let decorator = slog_term::TermDecorator::new().stderr().build();
            let drain = slog_term::FullFormat::new(decorator)
                .use_utc_timestamp()
                .build();
            root(drain, level)
        }
        Format::Json => root(slog_json::Json::default(std::io::stderr()), level),
        Format::Journald => root(slog_journald::JournaldDrain::default(), level),
    }
}

/// A failed write to the log is ignored: there is nowhere to report it.
fn root<D>(drain: D, level: slog::Level) -> (Logger, AsyncGuard)
where
    D: Drain + Send + 'static,
{
    let (drain, written) = Async::new(drain.ignore_res())
        .thread_name("log".to_owned())
        .chan_size(LINES_MAX)
        .overflow_strategy(OverflowStrategy::DropAndReport)
        .build_with_guard();
    let drain = LevelFilter::new(drain, level).ignore_res();
    (Logger::root(drain, o!()), written)
}
