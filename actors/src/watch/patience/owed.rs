//! Computes the CPU time that the host owes an instance, from scheduler statistics.
//!
//! ```text
//!   reading          reading          reading          reading
//!  ────┼────────────────┼────────────────┼────────────────┼────▶
//!      runs   ┌──── waits for a CPU ───────────────┐ runs
//!             │  found later    │ seen: stuck      │ told by the kernel: all of it
//! ```
//!
//! The kernel adds a wait to a thread's account when the wait ends (`run_delay` in kernel/sched/stats.h). Before that,
//! an ongoing wait shows as no change: the thread is ready, and has neither run nor waited since the last reading.
//! When the kernel reports the wait, the time already counted is subtracted.

use std::collections::BTreeMap;
use std::time::Duration;

use kmorph_backends::contract::ThreadTime;
use kmp_proto::time::Instant;

/// The debt of the host since the first reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owed {
    /// Time in which threads waited and then ran.
    pub(super) waited: Duration,
    /// Time in which a thread was ready and did not run between two readings.
    pub(super) starved: Duration,
}

impl Owed {
    pub(super) fn all(&self) -> Duration {
        self.waited + self.starved
    }
}

/// The readings of one silence.
#[derive(Debug, Default)]
pub(super) struct Readings {
    last: Option<(Instant, BTreeMap<i32, Account>)>,
    owed: Owed,
}

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    ran: Duration,
    waited: Duration,
    runnable: bool,
    /// Time already counted for ongoing waits.
    ahead: Duration,
}

impl Readings {
    pub(super) fn owed(&self) -> Owed {
        self.owed
    }

    /// Adds the accounts of all threads at `now`. The debt never exceeds the elapsed time, however many threads wait.
    pub(super) fn take(&mut self, threads: &[ThreadTime], now: Instant) {
        let Some((at, before)) = self.last.take() else {
            let accounts = threads.iter().map(|time| (time.thread, opened(time)));
            self.last = Some((now, accounts.collect()));
            return;
        };
        let passed = now - at;
        let (mut waited, mut stuck) = (Duration::ZERO, false);
        let mut accounts = BTreeMap::new();
        for time in threads {
            // A new thread has accumulated its whole account since the last reading.
            let before = before.get(&time.thread).copied().unwrap_or_default();
            let mut account = opened(time);
            if before.runnable && account.is_where(&before) {
                account.ahead = before.ahead + passed;
                stuck = true;
            } else {
                let told = time.waited.saturating_sub(before.waited);
                waited += told.saturating_sub(before.ahead);
            }
            accounts.insert(time.thread, account);
        }
        match stuck {
            true => self.owed.starved += passed,
            false => self.owed.waited += waited.min(passed),
        }
        self.last = Some((now, accounts));
    }
}

impl Account {
    fn is_where(&self, before: &Self) -> bool {
        (self.ran, self.waited, self.runnable) == (before.ran, before.waited, before.runnable)
    }
}

fn opened(time: &ThreadTime) -> Account {
    Account {
        ran: time.ran,
        waited: time.waited,
        runnable: time.runnable,
        ahead: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos(seconds * 1_000_000_000)
    }

    /// Returns a thread's account, in seconds.
    fn thread(thread: i32, ran: u64, waited: u64, runnable: bool) -> ThreadTime {
        ThreadTime {
            thread,
            ran: Duration::from_secs(ran),
            waited: Duration::from_secs(waited),
            runnable,
        }
    }

    fn owed_after(readings: &[&[ThreadTime]]) -> (u64, u64) {
        let mut all = Readings::default();
        for (second, threads) in (0..).zip(readings) {
            all.take(threads, at(second));
        }
        let owed = all.owed();
        (owed.waited.as_secs(), owed.starved.as_secs())
    }

    #[test]
    fn a_wait_that_goes_on_is_seen_and_not_counted_twice() {
        let owed = owed_after(&[
            &[thread(1, 5, 9, true)],
            &[thread(1, 5, 9, true)],
            &[thread(1, 5, 9, true)],
            // The thread ran at last: the kernel reports all three seconds, and one of them was not seen.
            &[thread(1, 6, 12, false)],
        ]);
        assert_eq!(owed, (1, 2));
    }

    #[test]
    fn one_that_runs_or_sleeps_is_owed_nothing() {
        assert_eq!(
            owed_after(&[&[thread(1, 5, 9, true)], &[thread(1, 6, 9, true)]]),
            (0, 0)
        );
        let sleeps = [thread(1, 5, 9, false)];
        assert_eq!(owed_after(&[&sleeps, &sleeps]), (0, 0));
        // The thread waits since then; the kernel reports the duration when the wait ends.
        let woken = [thread(1, 5, 9, true)];
        assert_eq!(owed_after(&[&sleeps, &woken]), (0, 0));
    }

    #[test]
    fn threads_that_wait_at_once_are_owed_what_passed_and_a_new_one_what_it_waited() {
        let first = [thread(1, 0, 0, false), thread(2, 0, 0, false)];
        let both = [thread(1, 1, 1, false), thread(2, 1, 1, false)];
        assert_eq!(owed_after(&[&first, &both]), (1, 0));
        let another = [
            thread(1, 0, 0, false),
            thread(2, 0, 0, false),
            thread(3, 0, 1, true),
        ];
        assert_eq!(owed_after(&[&first, &another]), (1, 0));
        assert_eq!(owed_after(&[&first, &[]]), (0, 0));
    }
}
