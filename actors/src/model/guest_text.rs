//! Sanitizes text from an instance, once, at the entry.
//!
//! Everything behind this point (logs, events, journal, API) may show the text. It contains no control characters, so
//! it cannot start a new log line or steer a terminal; it contains no characters that change the text direction, and
//! its length is limited.

use kmp_proto::message::{Check, Hello, Message};

/// Maximum number of characters of a text for people.
pub(crate) const TEXT_MAX_CHARS: usize = 512;
/// Maximum number of characters of a name or a version.
pub(crate) const NAME_MAX_CHARS: usize = 128;
/// Maximum number of characters of a kernel log's tail.
pub(crate) const LOG_MAX_CHARS: usize = 16 * 1024;

/// Returns one line: escapes unprintable characters as Rust does (`\u{1b}`) and truncates long text with an ellipsis.
pub(crate) fn line(text: &str) -> String {
    escaped(text, TEXT_MAX_CHARS, &[])
}

/// As [`line()`], for several lines.
pub(crate) fn lines(text: &str) -> String {
    escaped(text, LOG_MAX_CHARS, &['\n', '\t'])
}

/// As [`line()`], for a name or a version.
pub(crate) fn name(text: &str) -> String {
    escaped(text, NAME_MAX_CHARS, &[])
}

fn escaped(text: &str, max_chars: usize, kept: &[char]) -> String {
    let mut shown = String::with_capacity(text.len().min(max_chars));
    let mut count = 0;
    for character in text.chars() {
        let plain = kept.contains(&character) || !misleads(character);
        let width = match plain {
            true => 1,
            false => character.escape_default().count(),
        };
        count += width;
        if count > max_chars {
            shown.push('…');
            break;
        }
        match plain {
            true => shown.push(character),
            false => shown.extend(character.escape_default()),
        }
    }
    shown
}

/// Returns whether a character controls the display instead of being visible: control characters, line and
/// paragraph separators, bidirectional controls, zero-width characters and tags.
fn misleads(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// Sanitizes every text for people in a message. Other texts, such as an instance's name, are compared with the
/// expected value before they are shown.
pub(crate) fn clean(message: &mut Message) {
    match message {
        Message::Hello(hello) | Message::HelloReply(hello) => clean_hello(hello),
        Message::HealthStatus(status) => in_place(&mut status.text, line),
        Message::RecoverPrepare(notice) => in_place(&mut notice.text, line),
        Message::MorphNegotiateReply(reply) => {
            let offers = reply.offers.iter_mut();
            offers.for_each(|offer| in_place(&mut offer.why_not, line));
        }
        Message::MorphValidateReply(reply) => reply.checks.iter_mut().for_each(clean_check),
        Message::MorphRollback(rollback) => in_place(&mut rollback.text, line),
        Message::Error(error) => in_place(&mut error.text, line),
        // The other messages contain only numbers, bytes and names that are compared.
        _ => {}
    }
}

/// As [`clean`].
pub(crate) fn clean_hello(hello: &mut Hello) {
    in_place(&mut hello.kernel_release, name);
    in_place(&mut hello.agent_version, name);
}

fn clean_check(check: &mut Check) {
    in_place(&mut check.name, name);
    in_place(&mut check.detail, line);
}

fn in_place(text: &mut String, with: fn(&str) -> String) {
    *text = with(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_text_stays_as_it_is() {
        for text in [
            "",
            "Oops: 0002 [#1] SMP",
            "naïve 日本語 \\u{1b} \"x\"",
            "שלום",
        ] {
            assert_eq!(line(text), text);
            assert_eq!(lines(text), text);
        }
    }

    #[test]
    fn what_steers_a_terminal_or_a_reader_is_shown_instead() {
        assert_eq!(
            line("a\x1b[2Jb\nERROR fake\r\x07\u{9b}31m"),
            "a\\u{1b}[2Jb\\nERROR fake\\r\\u{7}\\u{9b}31m"
        );
        for hidden in [
            '\u{202e}', '\u{2066}', '\u{200b}', '\u{2028}', '\u{feff}', '\u{61c}',
        ] {
            let shown = line(&format!("x{hidden}y"));
            assert!(shown.is_ascii() && shown.starts_with("x\\u{"), "{shown}");
        }
        assert_eq!(lines("a\n\tb\x1b"), "a\n\tb\\u{1b}");
    }

    #[test]
    fn every_text_of_a_message_is_cleaned() {
        use kmp_proto::message::{
            ErrorInfo, Health, HealthStatus, HealthStatusFixed, NegotiateReply, ProviderOffer,
            StateProvider, WorkloadState,
        };
        let text = "a\x1bb".to_owned();
        let fixed = HealthStatusFixed {
            health: Health::Degraded,
            workload: WorkloadState::Running,
            flags: 0,
            exit_status: 0,
            restarts: 0,
        };
        let mut status = Message::HealthStatus(HealthStatus {
            fixed,
            text: text.clone(),
        });
        clean(&mut status);
        assert!(matches!(status, Message::HealthStatus(s) if s.text == "a\\u{1b}b"));
        let mut error = Message::Error(ErrorInfo {
            code: kmp_proto::wire::ErrorCode::Busy,
            offending_type: 0,
            offending_sequence: 0,
            text: text.clone(),
        });
        clean(&mut error);
        assert!(matches!(error, Message::Error(e) if e.text == "a\\u{1b}b"));
        let mut reply = Message::MorphNegotiateReply(NegotiateReply {
            session: 1,
            offers: vec![ProviderOffer {
                provider: StateProvider::Cooperative,
                memory_bytes: 0,
                dirty_bytes_per_s: 0,
                state_kinds: 0,
                modes: 0,
                state_version: 0,
                why_not: text,
            }],
        });
        clean(&mut reply);
        let Message::MorphNegotiateReply(reply) = reply else {
            panic!("another message");
        };
        assert_eq!(reply.offers[0].why_not, "a\\u{1b}b");
    }

    #[test]
    fn it_has_a_bound_also_when_everything_is_escaped() {
        for text in ["x".repeat(10_000), "\x1b".repeat(10_000)] {
            let shown = line(&text);
            assert!(shown.chars().count() <= TEXT_MAX_CHARS + 1);
            assert!(shown.ends_with('…'));
        }
        assert_eq!(
            line(&"x".repeat(TEXT_MAX_CHARS)).chars().count(),
            TEXT_MAX_CHARS
        );
    }
}
