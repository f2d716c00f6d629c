//! The commit record: the durable entry that the target owns the instance.
//!
//! ```text
//! engine ──▶ CommitOrder ──(the journal makes it durable)──▶ CommitRecord ──▶ SERVE
//! ```
//!
//! An order can be carried out once: it is not `Clone`, and [`CommitOrder::recorded`] consumes it. The only other
//! source of a record is the journal, when it restores the record of an earlier daemon. SERVE is sent only with a
//! record.

/// The order to make the commit record durable.
#[derive(Debug, PartialEq, Eq)]
pub struct CommitOrder {
    source: u64,
    target: u64,
}

/// The proof that the commit record of a morph is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitRecord {
    source: u64,
    target: u64,
}

impl CommitOrder {
    pub(super) fn new(source: u64, target: u64) -> Self {
        Self { source, target }
    }

    /// Certifies that the record is durable. Only for journals, which have written it.
    pub fn recorded(self) -> CommitRecord {
        CommitRecord {
            source: self.source,
            target: self.target,
        }
    }
}

impl CommitRecord {
    /// Restores the record that an earlier daemon wrote to its journal, from the generations of both sides.
    pub fn restore_from_journal(source: u64, target: u64) -> Self {
        Self { source, target }
    }

    /// Returns the source generation.
    pub fn source(&self) -> u64 {
        self.source
    }

    /// Returns the generation that owns the instance.
    pub fn target(&self) -> u64 {
        self.target
    }
}
