//! The faults of a run, all derived from the seed.

/// A seeded source of choices (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Returns a number from 0 to `end`, exclusive.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Returns true with a chance of `chance` percent.
    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// A fault at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    KillSource,
    KillTarget,
    KillServing,
    KillDaemon,
    AskForRollback,
}

/// The faults of one run.
#[derive(Clone, Debug)]
pub(crate) struct Faults {
    /// Share of messages lost, percent.
    pub(crate) loss: u64,
    /// Share of messages duplicated, percent.
    pub(crate) duplication: u64,
    /// Maximum delay of a message, ms.
    pub(crate) delay_ms: u64,
    /// Faults that occur before the n-th action that the daemon takes.
    pub(crate) strikes: Vec<(usize, Strike)>,
    /// Time of the end of all faults, ms.
    pub(crate) heal_ms: u64,
}

/// Number of actions in a quiet morph, with a margin: later strikes hit the time after the morph.
pub(crate) const STEPS: u64 = 40;

impl Faults {
    pub(crate) fn none() -> Self {
        Self {
            loss: 0,
            duplication: 0,
            delay_ms: 5,
            strikes: Vec::new(),
            heal_ms: 0,
        }
    }

    pub(crate) fn from_seed(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let strikes = (0..dice.below(4))
            .map(|_| {
                let step = usize::try_from(dice.below(STEPS)).unwrap();
                let strike = match dice.below(6) {
                    0 => Strike::KillSource,
                    1 => Strike::KillTarget,
                    2 => Strike::KillServing,
                    3 => Strike::AskForRollback,
                    _ => Strike::KillDaemon,
                };
                (step, strike)
            })
            .collect();
        Self {
            loss: [0, 0, 2, 10, 30][usize::try_from(dice.below(5)).unwrap()],
            duplication: [0, 5, 30][usize::try_from(dice.below(3)).unwrap()],
            delay_ms: [2, 20, 400, 1500][usize::try_from(dice.below(4)).unwrap()],
            strikes,
            heal_ms: 2000 + dice.below(10_000),
        }
    }
}
