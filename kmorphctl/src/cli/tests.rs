//! Tests of the command line and its meaning.

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use std::path::Path;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

fn command(line: &str) -> Command {
    parse(line)
        .unwrap_or_else(|error| panic!("{line}: {error}"))
        .command
}

fn refused(line: &str) -> ErrorKind {
    match parse(line) {
        Ok(cli) => panic!("{line}: {:?}", cli.command),
        Err(error) => error.kind(),
    }
}

#[test]
fn the_command_line_is_consistent_in_itself() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_of_the_product_parses() {
    for line in [
        "kmorphctl daemon start",
        "kmorphctl daemon start --config=/etc/kmorph/kmorphd.conf",
        "kmorphctl daemon stop --graceful",
        "kmorphctl daemon status",
        "kmorphctl daemon reload",
        "kmorphctl spawn web --kernel=/boot/vmlinuz --kernel-cmdline=quiet --initramfs=/i",
        "kmorphctl spawn web --kernel=/k --monitor --heartbeat-timeout=5",
        "kmorphctl list --verbose",
        "kmorphctl status web",
        "kmorphctl terminate web --force",
        "kmorphctl monitor --instance=web",
        "kmorphctl heartbeat web",
        "kmorphctl health web --metrics=cpu,memory,io",
        "kmorphctl ping web",
        "kmorphctl recover web",
        "kmorphctl vmcore capture web --output=/v",
        "kmorphctl vmcore analyze /v",
        "kmorphctl debug console",
        "kmorphctl recovery-log --instance=web --since=2h",
        "kmorphctl morph prepare web --kernel=/k",
        "kmorphctl morph validate web",
        "kmorphctl morph commit web",
        "kmorphctl morph rollback web",
        "kmorphctl morph web --kernel=/k",
        "kmorphctl morph web --kernel=/k --auto-commit --force",
        "kmorphctl policy show --instance=web",
        "kmorphctl policy set heartbeat-timeout web 1",
        "kmorphctl policy set auto-heal web enabled",
        "kmorphctl policy set auto-heal web disabled",
        "kmorphctl policy set morph-timeout web 60",
        "kmorphctl policy export --output=/p",
        "kmorphctl policy import /p",
        "kmorphctl operations watch op-1",
        "kmorphctl list --output-format json --socket /s",
        "kmorphctl --output-format=json --socket=/s list",
    ] {
        command(line);
    }
}

#[test]
fn a_whole_morph_needs_no_subcommand() {
    let Command::Morph(args) = command("kmorphctl morph web --kernel=/k --auto-commit") else {
        panic!("not a morph");
    };
    let whole = args.whole.unwrap();
    assert!(args.form.is_none());
    assert_eq!(
        (whole.name.as_str(), whole.auto_commit, whole.force),
        ("web", true, false)
    );
    assert_eq!(whole.target().kernel, Path::new("/k"));

    let Command::Morph(args) = command("kmorphctl morph commit web --no-wait") else {
        panic!("not a morph");
    };
    assert!(args.whole.is_none());
    assert!(matches!(args.form, Some(MorphForm::Commit { wait, .. }) if wait.no_wait));
}

#[test]
fn an_instance_named_like_a_step_can_be_morphed() {
    let Command::Morph(args) = command("kmorphctl morph run commit --kernel=/k") else {
        panic!("not a morph");
    };
    assert!(matches!(args.form, Some(MorphForm::Run(whole)) if whole.name == "commit"));
}

#[test]
fn spawn_has_the_documented_defaults() {
    let Command::Spawn(args) = command("kmorphctl spawn web --kernel=/k") else {
        panic!("not a spawn");
    };
    assert!(args.monitor);
    assert_eq!(
        (args.cpus, args.memory, args.heartbeat_timeout),
        (1, None, None)
    );
    let Command::Spawn(args) = command("kmorphctl spawn web --kernel=/k --monitor=false") else {
        panic!("not a spawn");
    };
    assert!(!args.monitor);
}

#[test]
fn a_workload_is_an_option_or_follows_the_dashes() {
    let lines = [
        "kmorphctl spawn web --kernel=/k --workload /bin/s --workload-arg=-v --env A=b",
        "kmorphctl spawn web --kernel=/k --env A=b -- /bin/s -v",
        "kmorphctl spawn web --kernel=/k --env A=b --workload /bin/s -- -v",
    ];
    for line in lines {
        let Command::Spawn(args) = command(line) else {
            panic!("not a spawn");
        };
        let workload = args.program().unwrap();
        assert_eq!(
            workload,
            ("/bin/s".to_owned(), vec!["-v".to_owned()]),
            "{line}"
        );
    }
    for alone in ["--env A=b", "--env-file=/f"] {
        let alone = refused(&format!("kmorphctl spawn web --kernel=/k {alone}"));
        assert_eq!(alone, ErrorKind::MissingRequiredArgument);
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    use ErrorKind as K;
    for (line, kind) in [
        ("kmorphctl spawn web", K::MissingRequiredArgument),
        ("kmorphctl spawn --kernel=/k", K::MissingRequiredArgument),
        (
            "kmorphctl spawn web --kernel=/k --cpus=0",
            K::ValueValidation,
        ),
        (
            "kmorphctl spawn web --kernel=/k --memory=lots",
            K::ValueValidation,
        ),
        (
            "kmorphctl spawn web --kernel=/k --heartbeat-timeout=0",
            K::ValueValidation,
        ),
        (
            "kmorphctl spawn web --kernel=/k --publish=80",
            K::ValueValidation,
        ),
        (
            "kmorphctl spawn web --kernel=/k --no-wait --wait-timeout=1",
            K::ArgumentConflict,
        ),
        ("kmorphctl morph web", K::MissingRequiredArgument),
        (
            "kmorphctl morph web --kernel=/k --force",
            K::MissingRequiredArgument,
        ),
        (
            "kmorphctl policy set heartbeat-timeout web soon",
            K::ValueValidation,
        ),
        ("kmorphctl policy set auto-heal web maybe", K::InvalidValue),
        ("kmorphctl policy set colour web red", K::InvalidSubcommand),
        ("kmorphctl health web --metrics=disk", K::InvalidValue),
        (
            "kmorphctl recovery-log --since=yesterday",
            K::ValueValidation,
        ),
        ("kmorphctl list --output-format=xml", K::InvalidValue),
        ("kmorphctl reboot", K::InvalidSubcommand),
    ] {
        assert_eq!(refused(line), kind, "{line}");
    }
}

#[test]
fn the_help_lists_every_exit_code() {
    let help = Cli::command().render_long_help().to_string();
    for row in crate::EXIT_CODES {
        let line = format!("{:>3}  {}", row.exit.code(), row.meaning);
        assert!(help.contains(&line), "{line}");
    }
}
