//! Splits an overlay that the kernel would truncate into several that it accepts one after the other.

use thiserror::Error;

use super::{Create, Fragment, MAX_OVERLAY_BYTES, Operation, Overlay, Target};
use crate::dtb::DtbError;

/// Why an overlay cannot be split into parts that the kernel accepts.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Unsplittable {
    /// A single operation is too large.
    #[error(
        "{operation} takes {bytes} bytes and the kernel takes {MAX_OVERLAY_BYTES} at a time: make it \
         smaller, it cannot be split"
    )]
    TooLarge {
        /// The operation.
        operation: &'static str,
        /// Size of an overlay with only this operation, bytes.
        bytes: usize,
    },
    /// The overlay cannot be written as a tree.
    #[error(transparent)]
    Unwritable(#[from] DtbError),
}

/// The smallest unit of a split: one operation on one CPU, device or range of memory, or on one instance.
struct Unit {
    /// Operations of the same fragment may be joined. Those of different fragments must not, because their order would
    /// change.
    fragment: usize,
    target: Target,
    operation: Operation,
}

impl Overlay {
    /// Splits the change into overlays of at most [`MAX_OVERLAY_BYTES`], to be applied in this order. Returns only this
    /// overlay if it is small enough.
    ///
    /// Each part is a separate transaction: other processes see the intermediate states, and the kernel undoes each
    /// part separately. [`crate::kernel::Kernel::apply`] undoes the earlier ones when a later one fails.
    ///
    /// # Errors
    ///
    /// If a single operation is too large, because of an instance's host tree or a name.
    pub fn split(&self) -> Result<Vec<Overlay>, Unsplittable> {
        if self.to_blob()?.len() <= MAX_OVERLAY_BYTES {
            return Ok(vec![self.clone()]);
        }
        let mut parts = Vec::new();
        let mut part = self.without_fragments();
        let mut last = None;
        for unit in self.units()? {
            let mut larger = part.clone();
            larger.add(&unit, last == Some(unit.fragment));
            if larger.to_blob()?.len() > MAX_OVERLAY_BYTES {
                parts.push(part);
                larger = self.without_fragments();
                larger.add(&unit, false);
            }
            last = Some(unit.fragment);
            part = larger;
        }
        parts.push(part);
        parts.retain(|part| !part.is_empty());
        Ok(parts)
    }

    /// Returns whether the kernel can undo all of it. It cannot undo the removal of an instance, nor the addition of
    /// memory to the pool.
    #[must_use]
    pub fn can_be_undone(&self) -> bool {
        self.fragments.iter().all(|fragment| {
            let undoable = |operation: &Operation| match operation {
                Operation::Remove(_) => false,
                Operation::MemoryAdd(_) => fragment.target != Target::Pool,
                _ => true,
            };
            fragment.operations.iter().all(undoable)
        })
    }

    fn without_fragments(&self) -> Overlay {
        Overlay {
            note: self.note.clone(),
            fragments: Vec::new(),
        }
    }

    /// Returns all units in the order in which the kernel executes them, each small enough.
    fn units(&self) -> Result<Vec<Unit>, Unsplittable> {
        let mut units = Vec::new();
        for (number, fragment) in self.fragments.iter().enumerate() {
            for name in Operation::order(&fragment.target) {
                let named = fragment.operations.iter().filter(|o| o.name() == name);
                for operation in named.flat_map(Operation::one_by_one) {
                    let unit = Unit {
                        fragment: number,
                        target: fragment.target.clone(),
                        operation,
                    };
                    self.push_unit(unit, &mut units)?;
                }
            }
        }
        Ok(units)
    }

    fn push_unit(&self, unit: Unit, units: &mut Vec<Unit>) -> Result<(), Unsplittable> {
        let mut alone = self.without_fragments();
        alone.add(&unit, false);
        let bytes = alone.to_blob()?.len();
        let excess = bytes.saturating_sub(MAX_OVERLAY_BYTES);
        if excess == 0 {
            units.push(unit);
            return Ok(());
        }
        let rest = match &unit.operation {
            Operation::Create(create) => later_cpus(create, excess),
            _ => None,
        };
        let Some((create, cpus)) = rest else {
            return Err(Unsplittable::TooLarge {
                operation: unit.operation.name(),
                bytes,
            });
        };
        let target = Target::Instance(create.instance.name.clone());
        let cpus = Operation::CpuAdd(cpus.into_iter().map(Into::into).collect());
        units.push(Unit {
            operation: Operation::Create(Box::new(create)),
            ..unit
        });
        // These units form a separate fragment: no later unit has this number and target.
        units.extend(cpus.one_by_one().into_iter().map(|operation| Unit {
            fragment: unit.fragment,
            target: target.clone(),
            operation,
        }));
        Ok(())
    }

    fn add(&mut self, unit: &Unit, same_fragment: bool) {
        let fragment = self
            .fragments
            .last_mut()
            .filter(|last| same_fragment && last.target == unit.target);
        let Some(fragment) = fragment else {
            self.fragments.push(Fragment {
                target: unit.target.clone(),
                operations: vec![unit.operation.clone()],
            });
            return;
        };
        let joined = fragment
            .operations
            .last_mut()
            .is_some_and(|last| last.join(&unit.operation));
        if !joined {
            fragment.operations.push(unit.operation.clone());
        }
    }
}

/// Returns the instance without enough of its CPUs to save `excess` bytes, and the removed CPUs; at least the boot CPU
/// stays.
fn later_cpus(create: &Create, excess: usize) -> Option<(Create, Vec<u64>)> {
    let fewer = excess.div_ceil(size_of::<u64>());
    let kept = create.instance.cpus.len().checked_sub(fewer)?;
    if kept == 0 {
        return None;
    }
    let mut create = create.clone();
    let later = create.instance.cpus.split_off(kept);
    Some((create, later))
}

impl Operation {
    /// Splits the operation into one for each of its objects.
    fn one_by_one(&self) -> Vec<Operation> {
        fn each<T: Clone>(items: &[T], operation: fn(Vec<T>) -> Operation) -> Vec<Operation> {
            items
                .iter()
                .map(|item| operation(vec![item.clone()]))
                .collect()
        }
        match self {
            Operation::Create(_) | Operation::Remove(_) => vec![self.clone()],
            Operation::MemoryAdd(items) => each(items, Operation::MemoryAdd),
            Operation::MemoryRemove(items) => each(items, Operation::MemoryRemove),
            Operation::CpuAdd(items) => each(items, Operation::CpuAdd),
            Operation::CpuRemove(items) => each(items, Operation::CpuRemove),
            Operation::DeviceAdd(items) => each(items, Operation::DeviceAdd),
            Operation::DeviceRemove(items) => each(items, Operation::DeviceRemove),
        }
    }

    /// Adds the objects of another operation of the same kind. Returns false if the kind differs.
    fn join(&mut self, other: &Operation) -> bool {
        match (self, other) {
            (Operation::MemoryAdd(own), Operation::MemoryAdd(more))
            | (Operation::MemoryRemove(own), Operation::MemoryRemove(more)) => {
                own.extend_from_slice(more);
            }
            (Operation::CpuAdd(own), Operation::CpuAdd(more))
            | (Operation::CpuRemove(own), Operation::CpuRemove(more)) => {
                own.extend_from_slice(more);
            }
            (Operation::DeviceAdd(own), Operation::DeviceAdd(more))
            | (Operation::DeviceRemove(own), Operation::DeviceRemove(more)) => {
                own.extend_from_slice(more);
            }
            _ => return false,
        }
        true
    }
}
