//! Coverage of the runs: the rows of the instance's transition table, and the commands given at each moment of a morph
//! or a recovery.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use kmorph_actors::platform::witness::{Machine, Step};
use kmp_proto::instance::TRANSITIONS;
use kmp_proto::transition::Transition;
use tokio::sync::mpsc::UnboundedSender;

use crate::daemon::DiskHandle;
use crate::dice::Dice;
use crate::run::NAMES;
use crate::scripts::{Deed, Followed};

/// A command that an operator can give to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Command {
    Spawn,
    Terminate,
    TerminateByForce,
    Recover,
    Morph,
    Validate,
    Commit,
    RollBack,
    Capture,
    ChangePolicy,
}

/// All commands.
pub(crate) const COMMANDS: [Command; 10] = [
    Command::Spawn,
    Command::Terminate,
    Command::TerminateByForce,
    Command::Recover,
    Command::Morph,
    Command::Validate,
    Command::Commit,
    Command::RollBack,
    Command::Capture,
    Command::ChangePolicy,
];

/// The moments of a morph, as in its transition table, and of a recovery: the earlier moments, of its instance, and its
/// own.
pub(crate) const MOMENTS: [&str; 21] = [
    "preparing",
    "negotiating",
    "transferring",
    "transferring.held",
    "validating",
    "committable",
    "committing.freezing",
    "committing.last_round",
    "committing.activating",
    "committing.recording",
    "committed.serving",
    "committed.retiring",
    "committed.fencing_source",
    "rolling_back.fencing_target",
    "rolling_back.resuming_source",
    "backing_off",
    "queued",
    "preparing_recovery",
    "capturing_vmcore",
    "reclaiming_resources",
    "respawning",
];

/// Rows that no run reaches: the end of a job and the record of a termination would have to cross, with the end on its
/// way to the instance when the instance learns of the record. But the instance tells the job at once, and actors take
/// the messages in their mailboxes before the futures that they wait for: a job that learns of the termination has not
/// ended, and ends as terminated. A recovery would have to learn of its successor's first healthy answer in the same
/// turn of the instance's actor in which the journal answers. `kmp-proto` tests these rows with the engine alone.
const NOT_TAKEN: [(&str, &str); 4] = [
    ("recovering", "RecoveryOver(Recovered)"),
    ("recovering", "RecoveryOver(Quarantined)"),
    ("morphing", "MorphOver(Committed)"),
    ("morphing", "MorphOver(RolledBack)"),
];

/// Events whose rows about a failure meanwhile no run comes by: the watch's verdict would have to reach the instance in the
/// turn in which its job ends. `kmp-proto` tests these rows with the engine alone, and its model check finds the order of
/// steps that leads to them.
const NOT_FAILED: [(&str, &str); 2] = [
    ("recovering", "RecoveryOver(Recovered)"),
    ("morphing", "MorphOver(RolledBack)"),
];

/// Chances, in percent, of a deed at a frequent moment and at a rare moment.
const SELDOM: u32 = 6;
const OFTEN: u32 = 25;

fn rows() -> impl Iterator<Item = &'static Transition> {
    TRANSITIONS.iter().copied().flatten()
}

/// How often the runs reached each row and each moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    /// Counts by the index of the row in the table.
    rows: BTreeMap<usize, u64>,
    commands: BTreeMap<(&'static str, Command), u64>,
    /// Steps that match no row of the table.
    unknown: BTreeSet<String>,
}

impl Coverage {
    /// Adds the coverage of other runs.
    pub(crate) fn add(&mut self, other: Self) {
        for (row, times) in other.rows {
            *self.rows.entry(row).or_default() += times;
        }
        for (command, times) in other.commands {
            *self.commands.entry(command).or_default() += times;
        }
        self.unknown.extend(other.unknown);
    }

    /// Counts the row of a step. A row names the effects that it may have, in order; among several matching rows, the
    /// row with the fewest additional effects counts.
    fn take(&mut self, step: &Step) {
        // Two rows of the same event have the same effects at the start of a daemon.
        let (event, decided) = match step.event.strip_suffix(", and decided") {
            Some(event) => (event, true),
            None => (step.event, false),
        };
        let fits = |row: &Transition| {
            let mut may = row.effects.iter();
            row.state == step.from
                && row.event == event
                && row.guard.starts_with("an earlier daemon decided") == decided
                && row.next == step.to
                && step.effects.iter().all(|done| may.any(|e| e == done))
        };
        let taken = rows().enumerate().filter(|(_, row)| fits(row));
        match taken.min_by_key(|(_, row)| row.effects.len()) {
            Some((at, _)) => *self.rows.entry(at).or_default() += 1,
            None if step.from == step.to && step.effects.is_empty() => {}
            None => {
                let Step {
                    from,
                    event,
                    to,
                    effects,
                    ..
                } = step;
                let text = format!("{from} --{event}--> {to}, {effects:?}");
                self.unknown.insert(text);
            }
        }
    }

    /// Returns the rows and commands that no run reached, and the steps that match no row.
    pub(crate) fn missing(&self) -> Vec<String> {
        let not_taken = |row: &Transition| {
            let event = (row.state, row.event);
            let ending = row.next == "ending" && NOT_TAKEN.contains(&event);
            ending || (row.next != "serving" && NOT_FAILED.contains(&event))
        };
        let wanted = rows().enumerate().filter(|(_, row)| !not_taken(row));
        let untaken = wanted.filter(|(at, _)| !self.rows.contains_key(at));
        let mut missing: Vec<_> = untaken.map(|(_, row)| format!("row: {row}")).collect();
        for moment in MOMENTS {
            let never = |command: &&Command| !self.commands.contains_key(&(moment, **command));
            let never: Vec<_> = COMMANDS.iter().filter(never).collect();
            if !never.is_empty() {
                missing.push(format!("{moment}: no {never:?}"));
            }
        }
        missing.extend(self.unknown.iter().map(|step| format!("unknown: {step}")));
        missing
    }
}

/// Prints the counts for people: the rows, rarest first, then a line for each moment.
impl std::fmt::Display for Coverage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = |at: &usize| self.rows.get(at).copied().unwrap_or(0);
        let mut table: Vec<_> = rows().enumerate().collect();
        table.sort_by_key(|(at, _)| count(at));
        writeln!(f, "{:>8}  row", "times")?;
        for (at, row) in table {
            let Transition {
                state,
                event,
                guard,
                next,
                ..
            } = row;
            writeln!(f, "{:>8}  {state} --{event}--> {next}  {guard}", count(&at))?;
        }
        let mut head = format!("{:<30}", "commands at");
        for command in COMMANDS {
            write!(head, "{:>17}", format!("{command:?}"))?;
        }
        writeln!(f, "{head}")?;
        for moment in MOMENTS {
            write!(f, "{moment:<30}")?;
            for command in COMMANDS {
                let times = self.commands.get(&(moment, command)).unwrap_or(&0);
                write!(f, "{times:>17}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Observes the engines of one run.
pub(crate) struct Watcher {
    pub(crate) coverage: Coverage,
    moments: BTreeMap<String, &'static str>,
    dice: Dice,
    /// True if prompts are sent at new moments.
    prompting: bool,
    /// Channel of prompts: tells an operator which instance has reached a moment.
    prompts: Option<UnboundedSender<Prompt>>,
    /// The opening of the run, with the disk on which it makes writes fail.
    script: Option<(Followed, DiskHandle)>,
}

/// A prompt to an operator.
pub(crate) enum Prompt {
    /// This instance has reached a moment.
    Moment(String),
    /// Deeds of a script for this instance.
    Deeds(String, &'static [Deed]),
}

impl Watcher {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            coverage: Coverage::default(),
            moments: BTreeMap::new(),
            dice: Dice::new(seed ^ 0x0065_7965),
            prompting: false,
            prompts: None,
            script: None,
        }
    }

    /// Resets the watcher for a new daemon, which has no operation under way yet.
    pub(crate) fn begin(&mut self, prompts: UnboundedSender<Prompt>) {
        self.moments.clear();
        self.prompting = false;
        self.prompts = Some(prompts);
    }

    /// Turns prompts at new moments on or off.
    pub(crate) fn prompt(&mut self, prompting: bool) {
        self.prompting = prompting;
    }

    /// Follows a script with the first instance from now on, or no script.
    pub(crate) fn follow(&mut self, script: Option<(Followed, DiskHandle)>) {
        self.script = script;
    }

    /// Returns true if a script has scenes left.
    pub(crate) fn follows(&self) -> bool {
        let script = self.script.as_ref();
        script.is_some_and(|(script, _)| !script.is_over())
    }

    pub(crate) fn see(&mut self, step: Step) {
        if let Some((script, disk)) = &mut self.script
            && step.instance == NAMES[0]
            && let Some(cue) = script.see(&step)
        {
            disk.borrow_mut().spoiled += u32::from(cue.spoils);
            if let Some(prompts) = &self.prompts {
                let _ = prompts.send(Prompt::Deeds(step.instance.clone(), cue.deeds));
            }
        }
        let moment = match step.machine {
            Machine::Instance => {
                self.coverage.take(&step);
                let writing = step
                    .effects
                    .iter()
                    .any(|effect| effect.starts_with("Record("));
                let begins = matches!(step.event, "adopted" | "spawned");
                let waits = matches!(step.to, "capturing" | "backing_off" | "queued");
                if writing || begins || waits && step.from != step.to {
                    self.maybe_prompt(OFTEN, &step.instance);
                }
                match step.to {
                    "backing_off" | "queued" => Some(step.to),
                    // The engine of the recovery or morph reports its own moments.
                    "recovering" | "morphing" => return,
                    _ => None,
                }
            }
            Machine::Recovery | Machine::Morph => (step.to != "done").then_some(step.to),
        };
        let before = match moment {
            Some(moment) => self.moments.insert(step.instance.clone(), moment),
            None => self.moments.remove(&step.instance),
        };
        if let Some(moment) = moment.filter(|moment| Some(*moment) != before) {
            let rare = moment.starts_with("commit")
                || moment.starts_with("rolling_back")
                || matches!(moment, "validating" | "reclaiming_resources" | "respawning");
            let odds = if rare { OFTEN } else { SELDOM };
            self.maybe_prompt(odds, &step.instance);
        }
    }

    fn maybe_prompt(&mut self, odds: u32, instance: &str) {
        if self.prompting
            && self.dice.percent(odds)
            && let Some(prompts) = &self.prompts
        {
            let _ = prompts.send(Prompt::Moment(instance.to_owned()));
        }
    }

    /// Records that a command is about to be given to `instance`.
    pub(crate) fn given(&mut self, command: Command, instance: &str) {
        if let Some(moment) = self.moments.get(instance) {
            *self
                .coverage
                .commands
                .entry((*moment, command))
                .or_default() += 1;
        }
    }
}
