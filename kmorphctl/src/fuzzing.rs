//! Entry points for the fuzzers in `fuzz/`; built only for them.

use crate::policy_file::{PolicyFile, render};

/// Parses `text` as a policy file. An error must name a position in the file, and a parsed set must
/// survive writing and parsing.
///
/// # Panics
/// If one of these does not hold.
pub fn policy_file(text: &str) {
    match PolicyFile::parse("p".to_owned(), text.to_owned()) {
        Ok(file) => {
            let written = render(&file.set).map_err(|failure| failure.message);
            let again = PolicyFile::parse("p".to_owned(), written.unwrap_or_default());
            assert_eq!(again.map(|again| again.set).ok(), Some(file.set));
        }
        Err(failure) => {
            let mut place = failure.message.splitn(4, ':').skip(1);
            let mut number = || place.next().and_then(|part| part.parse::<usize>().ok());
            let lines = text.matches('\n').count() + 1;
            assert!(number().is_some_and(|line| line <= lines), "{failure:?}");
            assert!(number().is_some_and(|column| column <= text.chars().count() + 1));
        }
    }
}
