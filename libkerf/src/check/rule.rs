//! The rules, and the reaction of kernel and kerf to each.

use serde::{Deserialize, Serialize};

/// Whether a tree is refused for a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub enum Severity {
    /// The tree is refused.
    Error,
    /// The tree is accepted, but a user should check it.
    Warning,
}

/// The reaction of the kernel or of kerf to a violated rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
pub enum Stance {
    /// Refuses it.
    Refuses,
    /// Accepts the tree with a warning.
    Warns,
    /// Accepts the tree silently, or does not check.
    Takes,
}

macro_rules! rules {
    ($( $name:ident $id:literal $severity:ident $kernel:ident $kerf:ident $what:literal; )*) => {
        /// A rule for trees. `docs/libkerf.md` contains the text of each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
        pub enum Rule {
            $( #[doc = $what] $name, )*
        }

        impl Rule {
            /// All rules, in the order of `docs/libkerf.md`.
            pub const ALL: &'static [Rule] = &[ $( Rule::$name, )* ];

            /// Returns the name in messages and documents.
            #[must_use]
            pub fn id(self) -> &'static str {
                match self { $( Rule::$name => $id, )* }
            }

            /// Returns the violation.
            #[must_use]
            pub fn what(self) -> &'static str {
                match self { $( Rule::$name => $what, )* }
            }

            /// Returns whether this crate refuses a tree that violates the rule.
            #[must_use]
            pub fn severity(self) -> Severity {
                match self { $( Rule::$name => Severity::$severity, )* }
            }

            /// Returns the reaction of the kernel (generations D and E).
            #[must_use]
            pub fn kernel(self) -> Stance {
                match self { $( Rule::$name => Stance::$kernel, )* }
            }

            /// Returns the reaction of kerf 0.4.0.
            #[must_use]
            pub fn kerf(self) -> Stance {
                match self { $( Rule::$name => Stance::$kerf, )* }
            }
        }
    };
}

// Name, id, this crate, the kernel, kerf, violation.
rules! {
    // Form.
    PropertyShape "property-shape" Error Refuses Refuses
        "A property's bytes do not have the format that its readers expect.";
    OlderForm "older-form" Error Refuses Refuses
        "The tree has the format of an older kernel or kerf, which the message names.";
    UnknownKind "unknown-kind" Error Refuses Refuses
        "The tree is not a baseline, pool, instance or overlay, or not the expected one of these.";
    BlobTooLarge "blob-too-large" Error Refuses Takes
        "An overlay of more than 4096 bytes, or a baseline of more than 1 MiB: the kernel accepts no more in one write.";

    // Resources: baseline and pool.
    ResourcesMissing "resources-missing" Error Refuses Refuses
        "There is no node /resources.";
    CpusMissing "cpus-missing" Error Refuses Refuses
        "A baseline names no CPUs.";
    Cpus32 "cpus-32-bit" Error Refuses Takes
        "CPUs are listed in 32-bit cells; the kernel reads 64-bit ids.";
    Cpus32Suspected "cpus-32-bit-suspected" Warning Takes Takes
        "All CPU ids have bits above bit 31, as an even list of 32-bit ids has when it is read as 64-bit ones.";
    CpuTwice "cpu-twice" Warning Takes Takes
        "A list names a CPU twice.";
    CpuBoot "cpu-boot" Warning Warns Takes
        "The pool takes physical CPU 0, which usually is the one the host booted on.";
    CpuHost "cpu-host" Error Refuses Takes
        "The pool takes logical CPU 0, which the host never releases.";
    CpuAbsent "cpu-absent" Error Refuses Warns
        "The machine has no CPU of this physical id.";
    MemoryMissing "memory-missing" Error Refuses Refuses
        "A baseline names no memory.";
    MemoryItem "memory-item" Error Refuses Refuses
        "A memory@ node has neither a size nor a reg.";
    MemoryByAddress "memory-by-address" Error Refuses Takes
        "A request for pool memory has a reg: the kernel picks the address, from a size.";
    MemorySize "memory-size" Error Refuses Takes
        "A size is zero or not a multiple of the 4096-byte page.";
    MemoryNodes "memory-nodes" Error Refuses Takes
        "A baseline has more memory@ nodes than the kernel has NUMA nodes.";
    PoolEmpty "pool-empty" Error Refuses Refuses
        "The requested memory is zero in total.";
    NumaRange "numa-range" Error Refuses Takes
        "A NUMA node's number is not below the kernel's limit (1024).";
    NumaName "numa-name" Error Takes Refuses
        "A node under topology/numa-nodes is not called node@ and a decimal number.";
    PciIncomplete "pci-incomplete" Error Refuses Takes
        "A PCI device has no pci-id, vendor-id or device-id.";
    PciFormat "pci-format" Error Refuses Takes
        "A pci-id does not read domain:bus:slot.function, in hexadecimal.";
    PciTwice "pci-twice" Warning Warns Takes
        "Two devices have the same PCI address: the second is not added to the pool.";
    DeviceType "device-type" Warning Warns Takes
        "A device has no device-type, or one other than pci and platform: the kernel skips it.";
    DeviceNameless "device-nameless" Error Refuses Takes
        "A platform device of an instance has neither device-name nor acpi-hid.";
    AliasLong "alias-long" Warning Takes Takes
        "An alias is longer than 31 characters: the kernel cuts it.";
    AliasDangling "alias-dangling" Warning Takes Takes
        "An alias does not point to a device.";
    LlcMask "llc-mask" Error Refuses Takes
        "A mask of last-level cache ways is zero.";
    LlcSparse "llc-sparse" Warning Takes Takes
        "A mask of last-level cache ways has gaps, which most processors do not take.";
    BaselineInstances "baseline-instances" Error Refuses Refuses
        "A baseline contains instances; overlays create them.";

    // A pool as read back.
    PoolWithoutCpus "pool-without-cpus" Warning Takes Refuses
        "The pool owns no CPU. The kernel shows this after all were returned to the host.";
    PoolWithoutMemory "pool-without-memory" Warning Takes Refuses
        "The pool owns no memory. The kernel shows this after all was returned to the host.";
    ChunkOverlap "chunk-overlap" Error Takes Takes
        "Two chunks of pool memory overlap, which the kernel cannot have made.";
    ChunkForeign "chunk-foreign" Error Takes Refuses
        "A chunk of pool memory is not in /proc/iomem.";
    FreeForeign "free-foreign" Error Takes Takes
        "A CPU is listed as free, but is not in the pool.";
    Granule "granule" Warning Takes Takes
        "memory-granule is not a power of two: kerf uses the memory block size instead.";

    // Instances.
    InstanceTwice "instance-twice" Error Refuses Takes
        "Two instances have the same name.";
    InstanceName "instance-name" Error Refuses Takes
        "An instance's name is empty, '.', '..', longer than 255 bytes, or has a slash.";
    NameMissing "name-missing" Error Refuses Refuses
        "instance-create or instance-remove names no instance.";
    IdMissing "id-missing" Error Takes Refuses
        "An instance has no id.";
    IdZero "id-zero" Error Refuses Takes
        "An instance has id 0, which is the host's.";
    IdRange "id-range" Error Refuses Takes
        "An id is above 2047: no kernel image can be loaded for it.";
    IdKerf "id-kerf" Warning Takes Warns
        "An id is above 511, the highest that kerf's commands take.";
    IdTwice "id-twice" Error Refuses Refuses
        "Two instances have the same id.";
    InstanceResources "instance-resources" Error Refuses Refuses
        "An instance has no node resources.";
    InstanceCpusMissing "instance-cpus-missing" Warning Takes Refuses
        "An instance has no CPUs: it can exist, but not boot.";
    InstanceCpusEmpty "instance-cpus-empty" Error Refuses Takes
        "An instance's list of CPUs is empty.";
    InstanceMemoryMissing "instance-memory-missing" Warning Takes Refuses
        "An instance has no memory-base or no memory-bytes: it can exist, but not boot.";
    InstanceMemorySize "instance-memory-size" Error Refuses Takes
        "An instance's memory is zero or not a multiple of the 4096-byte page.";
    InstanceMemoryBase "instance-memory-base" Warning Takes Warns
        "An instance's memory does not start at a page.";
    CpuBeyondPool "cpu-beyond-pool" Error Refuses Refuses
        "An instance has a CPU whose id is above all of the pool's.";
    CpuForeign "cpu-foreign" Error Refuses Takes
        "An instance has a CPU that is not in the pool.";
    CpuShared "cpu-shared" Error Refuses Refuses
        "Two instances share a CPU.";
    CpusExceedPool "cpus-exceed-pool" Error Takes Refuses
        "The instances' lists of CPUs are together longer than the pool's.";
    MemoryOutside "memory-outside" Error Takes Refuses
        "An instance's memory lies in no chunk of the pool.";
    MemoryOverflow "memory-overflow" Error Takes Takes
        "An instance's memory ends above 2^64.";
    MemoryOverlap "memory-overlap" Error Takes Refuses
        "The memory of two instances overlaps.";
    MemoryExceedsPool "memory-exceeds-pool" Error Refuses Refuses
        "The instances' memory is together more than the pool's.";
    MemoryFillsPool "memory-fills-pool" Error Refuses Takes
        "The instances' memory is exactly the pool's: nothing is left for the kernel's bookkeeping.";
    PoolSlack "pool-slack" Warning Takes Takes
        "Less than 2 MiB of the pool for each instance is left for the kernel's bookkeeping.";
    DeviceUnknown "device-unknown" Error Refuses Refuses
        "An instance has a device that the pool does not.";
    DeviceShared "device-shared" Error Refuses Takes
        "Two instances share a device, virtual function or namespace.";
    FunctionName "function-name" Error Takes Refuses
        "A virtual function or namespace has no number after _vf or _ns.";
    FunctionUnavailable "function-unavailable" Error Takes Refuses
        "A virtual function or namespace is not among those that its device has available.";
    DeviceNamesList "device-names-list" Warning Takes Refuses
        "device-names has more than one string: kerf 0.4.0 writes such trees but cannot read them.";
    ReferenceDangling "reference-dangling" Warning Takes Takes
        "A device reference has a parent that is not a device, or a function that is not available.";
    NumaAbsent "numa-absent" Error Refuses Takes
        "An instance requests memory of a NUMA node of which the pool has none.";
    PolicyUnknown "policy-unknown" Warning Takes Takes
        "A cpu-affinity or memory-policy has a value unknown to kerf.";
    BindNowhere "bind-nowhere" Warning Takes Takes
        "memory-policy is bind, but no NUMA node is given.";
    LlcWithoutPool "llc-without-pool" Error Refuses Takes
        "An instance has cache ways and the pool has none.";
    LlcOutside "llc-outside" Error Refuses Takes
        "An instance has cache ways that the pool does not have.";
    LlcShared "llc-shared" Error Refuses Takes
        "Two instances share a cache way.";
    Virtio "virtio" Error Refuses Takes
        "A virtio device has no device-id, or not 1 to 8 queues; or an instance has more than 16 such devices.";

    // Overlays.
    FragmentMissing "fragment-missing" Error Refuses Takes
        "An overlay has no node fragment@N.";
    FragmentUnit "fragment-unit" Error Refuses Takes
        "A fragment's unit address is not a 32-bit hexadecimal number.";
    FragmentTwice "fragment-twice" Warning Takes Takes
        "Two fragments have the same unit address: their order is undefined.";
    TargetMissing "target-missing" Error Refuses Takes
        "A fragment has no target-path.";
    TargetUnsupported "target-unsupported" Error Refuses Takes
        "A target-path is none of /resources, /instances and /instances/NAME.";
    TargetUnknown "target-unknown" Error Refuses Takes
        "A fragment changes an instance that does not exist.";
    OverlayMissing "overlay-missing" Error Refuses Takes
        "A fragment has no node __overlay__.";
    OverlayContent "overlay-content" Error Takes Takes
        "An overlay has a node or property that is unknown here: it would be lost when the overlay is written.";
    OperationUnknown "operation-unknown" Error Takes Takes
        "A node under __overlay__ is not an operation: the kernel ignores it.";
    OperationMisplaced "operation-misplaced" Error Refuses Takes
        "An operation appears under a target that does not support it.";
    ItemIgnored "item-ignored" Error Takes Takes
        "An item of an operation is not called memory@, cpu@ or pci@: the kernel skips it.";
    InstanceTaken "instance-taken" Error Refuses Takes
        "The name of a new instance is taken.";
    IdTaken "id-taken" Error Refuses Takes
        "The id of a new instance is taken.";
    InstanceRunning "instance-running" Error Refuses Takes
        "The overlay removes an instance that has a kernel loaded or running.";
    CpuNotFree "cpu-not-free" Error Refuses Takes
        "A CPU to be assigned is not free.";
    CpuNotHeld "cpu-not-held" Error Refuses Takes
        "A CPU to be removed is not there.";
    DeviceNotFree "device-not-free" Error Refuses Takes
        "A device to be assigned is not free.";
    DeviceNotHeld "device-not-held" Error Refuses Takes
        "A device to be removed is not there.";
    MemoryNotFree "memory-not-free" Error Refuses Takes
        "Memory to be assigned is not free, or there is not enough.";
    MemoryNotHeld "memory-not-held" Error Refuses Takes
        "Memory to be removed is not exactly an existing region or chunk.";
    MemoryGranule "memory-granule" Error Refuses Takes
        "Memory for a running instance does not start and end at its memory blocks.";
    ChosenContent "chosen-content" Error Refuses Takes
        "chosen of instance-create contains something other than multikernel,host-tree.";
    DeviceNamesCreate "device-names-create" Error Refuses Takes
        "instance-create has device-names; devices are assigned by device-add.";
    BaseIgnored "base-ignored" Warning Takes Takes
        "instance-create has memory-base, which the kernel ignores.";
    KerfCannotRead "kerf-cannot-read" Warning Takes Refuses
        "instance-create has no memory-base: kerf 0.4.0 writes such trees but cannot read them.";
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_rule_has_a_name_of_its_own() {
        let ids: HashSet<_> = Rule::ALL.iter().map(|rule| rule.id()).collect();
        assert_eq!(ids.len(), Rule::ALL.len());
        for rule in Rule::ALL {
            assert!(rule.what().ends_with('.'), "{}", rule.id());
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_refused() {
        for rule in Rule::ALL {
            if rule.kernel() == Stance::Refuses {
                assert_eq!(rule.severity(), Severity::Error, "{}", rule.id());
            }
        }
    }
}
