use thiserror::Error;

use super::memory::{free_ranges, place};
use crate::check::Report;
use crate::model::PciAddress;
use crate::overlay::{
    CpuMove, DeviceMove, MemoryMove, Operation, Overlay, State, Status, Target, Unsplittable,
};

/// Resources that move from one instance to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The giving instance: after a morph, the source.
    pub from: String,
    /// The receiving instance.
    pub to: String,
    /// What remains of the giver.
    pub handover: Handover,
    /// Additional memory of the receiver, bytes. For a running instance, a multiple of the memory
    /// block.
    pub memory: u64,
}

/// What remains of the giving instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handover {
    /// Nothing: all its resources move, and it ends. It must not have a kernel any more. The kernel
    /// cannot undo this.
    Everything,
    /// The instance stays and gives these CPUs and devices, for example to be able to take over again
    /// later. Memory then comes from the free memory of the pool.
    These {
        /// Physical ids.
        cpus: Vec<u64>,
        /// Devices.
        devices: Vec<PciAddress>,
    },
}

/// Why an exchange is impossible.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum NoExchange {
    /// The instance does not exist.
    #[error("there is no instance {0:?}")]
    Unknown(String),
    /// Both instances are the same.
    #[error("{0:?} cannot give to itself")]
    Itself(String),
    /// The memory is not available, or not in whole blocks.
    #[error("{wanted} bytes are not free in blocks of {block} bytes")]
    Memory {
        /// Requested bytes.
        wanted: u64,
        /// Size of the blocks in which a running kernel receives memory, bytes.
        block: u64,
    },
    /// A running kernel must be told the address of its new memory, and the free addresses are unknown.
    #[error("the location of the instances' memory is unknown: read /proc/iomem as root")]
    Unplaced,
    /// The kernel would truncate the overlay, and it cannot be split.
    #[error(transparent)]
    Unsplittable(#[from] Unsplittable),
    /// The kernel would refuse the overlay.
    #[error("the kernel would refuse it:\n{0}")]
    Refused(Report),
}

/// Plans an exchange as one overlay, which takes the given resources first.
///
/// # Errors
///
/// Why the exchange is impossible.
pub fn plan(state: &State, exchange: &Exchange) -> Result<Overlay, NoExchange> {
    let Exchange { from, to, .. } = exchange;
    if from == to {
        return Err(NoExchange::Itself(from.clone()));
    }
    let giver = state
        .system
        .instance(from)
        .ok_or_else(|| NoExchange::Unknown(from.clone()))?;
    if state.system.instance(to).is_none() {
        return Err(NoExchange::Unknown(to.clone()));
    }
    let (cpus, devices, taking) = match &exchange.handover {
        Handover::Everything => {
            let devices = giver
                .devices
                .iter()
                .filter_map(|name| state.address_of(name))
                .collect();
            let remove = Operation::Remove(from.clone());
            (
                giver.cpus.clone(),
                devices,
                (Target::Instances, vec![remove]),
            )
        }
        Handover::These { cpus, devices } => {
            let taken = [
                cpu_operation(cpus, Operation::CpuRemove),
                device_operation(devices, Operation::DeviceRemove),
            ];
            let operations = taken.into_iter().flatten().collect();
            (
                cpus.clone(),
                devices.clone(),
                (Target::Instance(from.clone()), operations),
            )
        }
    };
    let taking = Overlay::new([taking]);
    // Place memory in the ranges that are free once the giver has given its resources.
    let between = state.apply(&taking).map_err(NoExchange::Refused)?;
    let giving: Vec<Operation> = [
        memory_operation(&between, to, exchange.memory)?,
        cpu_operation(&cpus, Operation::CpuAdd),
        device_operation(&devices, Operation::DeviceAdd),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut overlay = taking;
    overlay
        .fragments
        .extend(Overlay::new([(Target::Instance(to.clone()), giving)]).fragments);
    overlay
        .fragments
        .retain(|fragment| !fragment.operations.is_empty());
    state.apply(&overlay).map_err(NoExchange::Refused)?;
    overlay.split()?;
    Ok(overlay)
}

fn cpu_operation(cpus: &[u64], operation: fn(Vec<CpuMove>) -> Operation) -> Option<Operation> {
    let moves: Vec<CpuMove> = cpus.iter().map(|cpu| CpuMove::from(*cpu)).collect();
    (!moves.is_empty()).then(|| operation(moves))
}

fn device_operation(
    devices: &[PciAddress],
    operation: fn(Vec<DeviceMove>) -> Operation,
) -> Option<Operation> {
    let moves: Vec<DeviceMove> = devices
        .iter()
        .map(|device| DeviceMove::from(*device))
        .collect();
    (!moves.is_empty()).then(|| operation(moves))
}

fn memory_operation(state: &State, to: &str, bytes: u64) -> Result<Option<Operation>, NoExchange> {
    if bytes == 0 {
        return Ok(None);
    }
    let is_active = state.status_of(to) == Status::Active;
    let block = if is_active {
        state.block
    } else {
        crate::model::PAGE_BYTES
    };
    let shortage = NoExchange::Memory {
        wanted: bytes,
        block,
    };
    let ranges = match free_ranges(state) {
        Some(free) => place(&free, bytes, block).ok_or(shortage)?,
        None if is_active => return Err(NoExchange::Unplaced),
        // For an instance that does not run, the kernel uses the size and picks the address.
        None if bytes.is_multiple_of(block) => vec![(0, bytes)],
        None => return Err(shortage),
    };
    let moves = ranges.into_iter().map(|(base, size)| MemoryMove {
        base: Some(base),
        size,
        ..MemoryMove::default()
    });
    Ok(Some(Operation::MemoryAdd(moves.collect())))
}
