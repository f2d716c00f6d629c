//! The parts that kerf 0.1 found with regular expressions.

/// Returns the texts between `open` and the next `close`, for each `key = open…close`, or
/// `key open…close` if `open` is a brace. Empty ones do not count.
pub(super) fn all_after<'a>(
    text: &'a str,
    key: &'a str,
    open: char,
    close: char,
) -> impl Iterator<Item = &'a str> + 'a {
    // Position of the last `close` found, which is the next one for every `open` before it.
    let mut known: Option<usize> = None;
    text.match_indices(key).filter_map(move |(at, _)| {
        let mut rest = text[at + key.len()..].trim_start();
        if open != '{' {
            rest = rest.strip_prefix('=')?.trim_start();
        }
        let inner = rest.strip_prefix(open)?;
        let start = text.len() - inner.len();
        let close_at = match known {
            Some(there) if there >= start => there,
            _ => inner.find(close).map_or(text.len(), |end| start + end),
        };
        known = Some(close_at);
        let end = close_at - start;
        if start + end == text.len() {
            return None;
        }
        (end > 0).then(|| &inner[..end])
    })
}

/// Returns the first of [`all_after`].
pub(super) fn after<'a>(text: &'a str, key: &'a str, open: char, close: char) -> Option<&'a str> {
    all_after(text, key, open, close).next()
}

/// Returns whether the text contains `key;`.
pub(super) fn flag(text: &str, key: &str) -> bool {
    let mut found = text.match_indices(key);
    found.any(|(at, _)| text[at + key.len()..].trim_start().starts_with(';'))
}

/// Returns the text in the braces of the first `key {`, up to the matching brace.
pub(super) fn block<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let open = text.match_indices(key).find_map(|(at, _)| {
        let rest = &text[at + key.len()..];
        let brace = rest.trim_start();
        brace.starts_with('{').then(|| text.len() - brace.len())
    })?;
    let end = brace_end(&text[open..])?;
    Some(&text[open + 1..open + end])
}

/// Returns the position of the brace that matches the one at the start of the text.
pub(super) fn brace_end(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

/// Returns the last word of a text, ignoring trailing white space.
pub(super) fn word_before(text: &str) -> Option<&str> {
    let text = text.trim_end();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let start = text.rfind(|c| !is_word(c)).map_or(0, |at| {
        at + text[at..].chars().next().map_or(1, char::len_utf8)
    });
    Some(&text[start..]).filter(|word| !word.is_empty())
}

/// Returns whether a label names a virtual function or a namespace: it ends in `_vf` or `_ns` and digits.
pub(super) fn is_function(label: &str) -> bool {
    let stem = label.trim_end_matches(|c: char| c.is_ascii_digit());
    let named = stem.strip_suffix("_vf").or(stem.strip_suffix("_ns"));
    stem.len() < label.len() && named.is_some_and(|name| !name.is_empty())
}

/// Returns the text in the braces of `word-word@digits { … }`, after the colon of its label, and
/// the text that follows.
pub(super) fn reference_body(text: &str) -> Option<(&str, &str)> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let word = |text: &str| text.find(|c| !is_word(c)).filter(|end| *end > 0);
    let text = text.trim_start();
    let text = text[word(text)?..].strip_prefix('-')?;
    let text = text[word(text)?..].strip_prefix('@')?;
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .filter(|end| *end > 0)?;
    let inner = text[digits..].trim_start().strip_prefix('{')?;
    let end = inner.find('}')?;
    (end > 0).then(|| (&inner[..end], &inner[end + 1..]))
}

/// Parses decimal numbers separated by white space; the error is the first invalid one.
pub(super) fn number_list(text: &str) -> Result<Vec<u64>, &str> {
    let words = text.split_whitespace();
    words
        .map(|word| {
            let is_number = word.bytes().all(|b| b.is_ascii_digit());
            word.parse().ok().filter(|_| is_number).ok_or(word)
        })
        .collect()
}
