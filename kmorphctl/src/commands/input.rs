//! Input files of commands.

use std::io::Read;
use std::path::Path;

use crate::failure::Failure;

/// Returns the name of `file` for messages, and its contents: at most `limit` bytes. `-` is standard input. `kind`
/// names the expected contents in an error, without an article.
pub(super) fn read(file: &Path, limit: u64, kind: &str) -> Result<(String, Vec<u8>), Failure> {
    let from_stdin = file.as_os_str() == "-";
    let name = match from_stdin {
        true => "standard input".to_owned(),
        false => file.display().to_string(),
    };
    let mut bytes = Vec::new();
    if from_stdin {
        let stdin = std::io::stdin().lock();
        let read = stdin.take(limit + 1).read_to_end(&mut bytes);
        read.map_err(|error| Failure::invalid(format!("cannot read {name}: {error}")))?;
    } else {
        bytes = kmorph_files::read_named(file, limit).map_err(|error| {
            Failure::invalid(error.to_string())
                .hint("give `-` to read standard input, , for example from a pipe")
        })?;
    }
    if bytes.len() as u64 > limit {
        let text = format!("{name} is too large: a {kind} has at most {limit} bytes");
        return Err(Failure::invalid(text));
    }
    Ok((name, bytes))
}
