//! Deeds at the moments that a run's watcher sees: by an operator, by faults, and by a script.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use crate::commands::Operator;
use crate::coverage::{COMMANDS, Prompt};
use crate::daemon::DiskHandle;
use crate::dice::Dice;
use crate::ports;
use crate::run::NAMES;
use crate::scripts::Deed;

/// Number of unconfirmed fences of each other kernel when a script makes them fail.
const OTHERS_STUBBORN: u32 = 3;
/// Maximum time from the entry of an operation to its request, in a script: by then, the entry is written.
const SETTLED: Duration = Duration::from_millis(10);

/// Executes prompts.
pub(crate) struct Prompted {
    pub(crate) operator: Operator,
    pub(crate) disk: DiskHandle,
    /// Notified when the daemon is to die.
    pub(crate) dies: Rc<Notify>,
    /// Number of actors of instances that are to panic.
    pub(crate) to_panic: Rc<Cell<u32>>,
    /// Share of moments at which a kernel is killed, percent.
    pub(crate) kills: u32,
    pub(crate) dice: Dice,
}

impl Prompted {
    /// Executes prompts until the run is over.
    pub(crate) async fn answer(mut self, mut prompts: mpsc::UnboundedReceiver<Prompt>) {
        while let Some(prompt) = prompts.recv().await {
            match prompt {
                Prompt::Moment(name) => self.moment(&name).await,
                Prompt::Deeds(name, deeds) => {
                    for deed in deeds {
                        self.act(*deed, &name).await;
                    }
                }
            }
        }
    }

    async fn moment(&mut self, name: &str) {
        let machine = &self.operator.machine;
        match machine.newest(name) {
            Some(key) if self.dice.percent(self.kills) => machine.kill(&key),
            Some(key) if self.dice.percent(self.kills / 4) => machine.hang(&key),
            _ => {
                if let Some(command) = self.dice.one_of(&COMMANDS).copied() {
                    self.operator.give(command, name, &mut self.dice).await;
                }
            }
        }
    }

    async fn act(&mut self, deed: Deed, name: &str) {
        let machine = &self.operator.machine;
        let newest = || machine.newest(name);
        match deed {
            Deed::Give(command) => {
                let operator = Operator {
                    settles: SETTLED,
                    ..self.operator.clone()
                };
                operator.give(command, name, &mut self.dice).await;
            }
            Deed::Morph => self.operator.begin_morph(name, true, true).await,
            Deed::AutoHealOff => self.operator.auto_heal_off(name).await,
            Deed::Kill => newest().iter().for_each(|key| machine.kill(key)),
            Deed::KillSource => machine
                .oldest(name)
                .iter()
                .for_each(|key| machine.kill(key)),
            Deed::Hang => newest().iter().for_each(|key| machine.hang(key)),
            Deed::Stubborn(fences) => newest()
                .iter()
                .for_each(|key| machine.stubborn(key, fences)),
            Deed::KillOthers => {
                for key in NAMES.iter().filter(|other| **other != name) {
                    if let Some(key) = machine.newest(key) {
                        machine.stubborn(&key, OTHERS_STUBBORN);
                        machine.kill(&key);
                    }
                }
            }
            Deed::Panic => {
                self.to_panic.set(self.to_panic.get() + 1);
                self.operator.panic(name).await;
            }
            Deed::SlowDisk => self.disk.borrow_mut().slow = true,
            Deed::ExpectOpen => {
                let port = machine.port_of(name);
                if !port.is_none_or(ports::takes_connections) {
                    machine.breaks(format!(
                        "the port of {name} refuses before its hold is over"
                    ));
                }
            }
            Deed::Write => machine.write(name),
            Deed::Die => self.dies.notify_one(),
            Deed::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
            Deed::WaitUpTo(ms) => {
                let wait = self.dice.below(ms);
                tokio::time::sleep(Duration::from_millis(wait)).await;
            }
        }
    }
}
