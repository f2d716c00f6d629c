//! Limits on concurrent connections and event streams, per caller.
//!
//! Each user has a limit, and all read-only users together have one, so that they cannot lock out the users who may
//! change things. Some seats are reserved for root and the daemon's own user.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Rank of a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// May only read.
    Looker,
    /// A member of the control group.
    Member,
    /// Root, or the user that the daemon runs as.
    Owner,
}

/// Numbers of seats.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Total.
    pub(super) total: usize,
    /// Part of the total that is reserved for owners.
    pub(super) reserved: usize,
    /// Maximum for one member.
    pub(super) of_a_member: usize,
    /// Maximum for all lookers together.
    pub(super) of_lookers: usize,
    /// Maximum for one looker.
    pub(super) of_a_looker: usize,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    of_lookers: usize,
    of_users: BTreeMap<u32, usize>,
}

/// The seats. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Seats {
    limits: Limits,
    taken: Arc<Mutex<Taken>>,
    freed: Arc<Notify>,
}

/// A taken seat; it is given back when it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    of: Seats,
    uid: u32,
    rank: Rank,
}

impl Seats {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            taken: Arc::default(),
            freed: Arc::default(),
        }
    }

    /// Takes a seat for this user. Returns `None` if a limit is reached.
    pub(super) fn take(&self, uid: u32, rank: Rank) -> Option<Seat> {
        let limits = &self.limits;
        let mut taken = self.taken();
        let own = taken.of_users.get(&uid).copied().unwrap_or(0);
        let below = |share: usize, of_user: usize| taken.total < share && own < of_user;
        let open_to_all = limits.total.saturating_sub(limits.reserved);
        let free = match rank {
            Rank::Owner => below(limits.total, limits.total),
            Rank::Member => below(open_to_all, limits.of_a_member),
            Rank::Looker => {
                taken.of_lookers < limits.of_lookers && below(open_to_all, limits.of_a_looker)
            }
        };
        if !free {
            return None;
        }
        taken.total += 1;
        taken.of_lookers += usize::from(rank == Rank::Looker);
        *taken.of_users.entry(uid).or_default() += 1;
        let of = self.clone();
        Some(Seat { of, uid, rank })
    }

    /// As [`Seats::take`], but waits for a free seat.
    pub(super) async fn wait(&self, uid: u32, rank: Rank) -> Seat {
        loop {
            let freed = self.freed.notified();
            if let Some(seat) = self.take(uid, rank) {
                return seat;
            }
            freed.await;
        }
    }

    /// Returns the number of taken seats.
    pub(super) fn in_use(&self) -> usize {
        self.taken().total
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.of.taken();
        taken.total -= 1;
        taken.of_lookers -= usize::from(self.rank == Rank::Looker);
        if let Some(own) = taken.of_users.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                taken.of_users.remove(&self.uid);
            }
        }
        drop(taken);
        self.of.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        total: 10,
        reserved: 2,
        of_a_member: 5,
        of_lookers: 4,
        of_a_looker: 3,
    };

    fn all(seats: &Seats, uid: u32, rank: Rank) -> Vec<Seat> {
        std::iter::from_fn(|| seats.take(uid, rank)).collect()
    }

    #[test]
    fn nobody_takes_what_is_for_others() {
        let seats = Seats::new(LIMITS);
        let lookers: Vec<_> = (100..200)
            .map(|uid| all(&seats, uid, Rank::Looker))
            .collect();
        assert_eq!(
            [lookers[0].len(), lookers[1].len(), lookers[2].len()],
            [3, 1, 0]
        );
        let members: Vec<_> = (200..300)
            .map(|uid| all(&seats, uid, Rank::Member))
            .collect();
        assert_eq!([members[0].len(), members[1].len()], [4, 0]);
        assert_eq!(all(&seats, 0, Rank::Owner).len(), 2);
    }

    #[test]
    fn one_member_leaves_some_to_the_next() {
        let seats = Seats::new(LIMITS);
        let first = all(&seats, 200, Rank::Member);
        assert_eq!(first.len(), 5);
        assert_eq!(all(&seats, 201, Rank::Member).len(), 3);
    }

    #[tokio::test]
    async fn what_is_given_back_can_be_taken_again() {
        let seats = Seats::new(LIMITS);
        let taken = all(&seats, 0, Rank::Owner);
        assert_eq!((taken.len(), seats.in_use()), (10, 10));
        assert!(seats.take(1, Rank::Looker).is_none());
        let waiting = seats.wait(0, Rank::Owner);
        let (seat, ()) = tokio::join!(waiting, async { drop(taken) });
        assert_eq!(seats.in_use(), 1);
        drop(seat);
        assert_eq!(all(&seats, 1, Rank::Looker).len(), 3);
        assert_eq!(seats.in_use(), 0);
    }
}
