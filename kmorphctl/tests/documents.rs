//! The documents and what the program makes of itself agree with what it does.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::path::Path;

use clap::CommandFactory;

fn cli_md() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn the_page_lists_the_exit_codes_as_the_help_does() {
    let page = cli_md();
    let listed: Vec<&str> = page
        .lines()
        .skip_while(|line| *line != "## Exit codes")
        .filter(|line| line.starts_with("| ") && !line.starts_with("| code"))
        .take(kmorphctl::EXIT_CODES.len())
        .collect();
    let wanted =
        kmorphctl::EXIT_CODES.map(|row| format!("| {} | {} |", row.exit.code(), row.meaning));
    assert_eq!(listed, wanted);
}

/// The words of every command that does something.
fn leaves(command: &clap::Command, words: &str, found: &mut Vec<String>) {
    for sub in command
        .get_subcommands()
        .filter(|sub| sub.get_name() != "help")
    {
        let words = format!("{words} {}", sub.get_name());
        if !sub.is_subcommand_required_set() {
            found.push(words.trim().to_owned());
        }
        leaves(sub, &words, found);
    }
}

#[test]
fn the_page_names_every_command() {
    let page = cli_md();
    let mut commands = Vec::new();
    leaves(&kmorphctl::cli::Cli::command(), "", &mut commands);
    assert!(commands.len() > 30, "{commands:?}");
    for command in commands {
        let words = [
            format!("`{command} "),
            format!("`{command}`"),
            format!("kmorphctl {command} "),
        ];
        let named = words.iter().any(|words| page.contains(words));
        assert!(named, "docs/cli.md does not name `{command}`");
    }
}

#[test]
fn completions_and_man_pages_need_no_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none");
    for shell in ["bash", "zsh", "fish"] {
        let ended = support::ctl(&socket, &["completions", shell]);
        assert_eq!(ended.code, 0);
        assert!(ended.stdout.contains("recovery-log"), "{shell}");
    }
    let man = dir.path().join("man1");
    assert_eq!(
        support::ctl(&socket, &["man", man.to_str().unwrap()]).code,
        0
    );
    let page = std::fs::read_to_string(man.join("kmorphctl-policy-import.1")).unwrap();
    assert!(page.contains(".TH kmorphctl-policy-import 1"), "{page}");
}
