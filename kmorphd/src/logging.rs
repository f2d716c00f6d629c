//! The log: readable on a terminal, JSON or journald for machines.

use std::sync::Mutex;

use slog::{Drain, LevelFilter, Logger, o};

use crate::config::{Format, Level, Log};

/// The root logger. Lines are written by the thread that logs: nothing is queued, nothing is lost.
pub(crate) fn logger(log: &Log) -> Logger {
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
fn root<D>(drain: D, level: slog::Level) -> Logger
where
    D: Drain + Send + 'static,
{
    let drain = LevelFilter::new(Mutex::new(drain).ignore_res(), level).ignore_res();
    Logger::root(drain, o!())
}
