//! Reads the environment file of a workload at each start of a generation; the daemon stores its contents nowhere.
//!
//! A line is `NAME=VALUE`; the value is the text after the first `=`, up to the end of the line, unchanged. Blank
//! lines and lines that begin with `#` are ignored. Messages contain names and line numbers, never values.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use crate::model::{Failure, FailureKind, Workload};
use kmorph_files::{Refusal, read_secret};

use super::check_workload;
use crate::platform::ambient;

/// Maximum size of the file, bytes: more than a program can receive.
pub const ENV_FILE_MAX_BYTES: u64 = 256 * 1024;

/// Adds the variables of its file to the environment of a workload. Variables of the request take precedence.
///
/// # Errors
/// When the file is accessible to others than the daemon's user, cannot be read, or has an invalid line; when no
/// kernel would start a program with this environment.
pub(crate) async fn complete(request: &Workload) -> Result<Workload, Failure> {
    let mut whole = request.clone();
    let Some(path) = whole.env_file.take() else {
        return Ok(whole);
    };
    let read = ambient::blocking(move || read(path.as_ref())).await;
    let gone = |error| Failure::new(FailureKind::Internal, format!("reading a file: {error}"));
    let mut variables = read.map_err(gone)??;
    variables.append(&mut whole.env);
    whole.env = variables;
    check_workload(&whole)?;
    Ok(whole)
}

fn read(path: &Path) -> Result<BTreeMap<String, String>, Failure> {
    let bytes = read_secret(path, ENV_FILE_MAX_BYTES).map_err(|refusal| {
        let code = match &refusal {
            Refusal::System { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                FailureKind::NotFound
            }
            _ => FailureKind::InvalidRequest,
        };
        let text = format!("the environment file of the workload is not used: {refusal}");
        Failure::new(code, text).hint(
            "the daemon reads it at each start: it must be a regular file of root or of the daemon's user, and \
             nobody else's to read or write (chmod 600)",
        )
    })?;
    parse(&bytes).map_err(|text| {
        let text = format!("invalid environment file {path:?}: {text}");
        Failure::new(FailureKind::InvalidRequest, text)
    })
}

fn parse(bytes: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    let mut variables = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let begin = line.trim_start();
        if begin.is_empty() || begin.starts_with('#') {
            continue;
        }
        let (name, value) = line
            .split_once('=')
            .ok_or_else(|| format!("line {number} has no `=`: write NAME=VALUE"))?;
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(format!(
                "line {number} does not begin with the name of a variable: write NAME=VALUE"
            ));
        }
        match variables.entry(name.to_owned()) {
            Entry::Vacant(place) => place.insert(value.to_owned()),
            Entry::Occupied(_) => return Err(format!("line {number} sets {name} again")),
        };
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn values_are_taken_as_they_are() {
        let text = "# a comment\n\n  # another\nPASSWORD= a=b \"c\" #d\r\nEMPTY=\nLAST=x";
        let read = parse(text.as_bytes()).unwrap();
        let expected = [("EMPTY", ""), ("LAST", "x"), ("PASSWORD", " a=b \"c\" #d")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(read, BTreeMap::from(expected));
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line_without_the_value() {
        for (text, told) in [
            ("A=1\nhunter2", "line 2 has no `=`"),
            ("export A=hunter2", "line 1 does not begin"),
            ("=hunter2", "line 1 does not begin"),
            ("A=hunter2\nA=hunter2", "line 2 sets A again"),
        ] {
            let refused = parse(text.as_bytes()).unwrap_err();
            assert!(refused.contains(told), "{refused}");
            assert!(!refused.contains("hunter2"), "{refused}");
        }
        assert!(parse(b"A=\xff").unwrap_err().contains("UTF-8"));
    }

    #[tokio::test]
    async fn a_file_adds_to_the_request_and_is_held_to_the_same_limits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("env");
        let write = |text: &str| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        };
        write("A=file\nB=file");
        let request = Workload {
            program: "/bin/server".to_owned(),
            args: Vec::new(),
            env: [("A".to_owned(), "request".to_owned())].into(),
            env_file: Some(path.to_string_lossy().into_owned()),
        };
        let whole = complete(&request).await.unwrap();
        assert_eq!(
            (&whole.env["A"][..], &whole.env["B"][..]),
            ("request", "file")
        );
        assert_eq!(whole.env_file, None);
        write(&format!("A={}", "x".repeat(super::super::STRING_MAX_BYTES)));
        let of_the_file = Workload {
            env: BTreeMap::new(),
            ..request.clone()
        };
        let refused = complete(&of_the_file).await.unwrap_err();
        assert!(refused.message.contains("131071"), "{}", refused.message);
        std::fs::remove_file(&path).unwrap();
        let refused = complete(&request).await.unwrap_err();
        assert_eq!(refused.kind, FailureKind::NotFound);
    }
}
