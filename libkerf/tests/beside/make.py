"""Writes what kerf makes: `!HI`, a name, and a blob, for each of its overlays and trees."""

import struct
import sys

from kerf.devices import pci_node_name
from kerf.dtc.extractor import InstanceExtractor
from kerf.dtc.overlay import OverlayGenerator
from kerf.models import (CPUAllocation, DeviceInfo, GlobalDeviceTree, HardwareInventory, Instance,
                         InstanceResources, MemoryAllocation, PoolMemoryRegion)
from kerf.pool_diff import PoolDiff

NIC = "0000:09:00.0"
NODE = pci_node_name(NIC)


def system(instances):
    devices = {NODE: DeviceInfo(name=NODE, compatible="pci-network", device_type="pci", pci_id=NIC,
                                vendor_id=0x8086, device_id=0x1572, alias="enp9s0")}
    memory = MemoryAllocation(total_bytes=1 << 31, host_reserved_bytes=0, requested={0: 1 << 31})
    cpus = CPUAllocation(total=19, host_reserved=[], available=[8, 10, 12, 14, 16, 18])
    hardware = HardwareInventory(cpus=cpus, memory=memory, devices=devices)
    return GlobalDeviceTree(hardware=hardware, instances=instances, device_references={})


def instance(cpus, memory, **more):
    resources = InstanceResources(cpus=cpus, memory_base=0, memory_bytes=memory,
                                  devices=more.pop("devices", []), **more)
    return Instance(name="web", id=3, resources=resources, options={"enable-host-kcore": True})


def main():
    generator = OverlayGenerator()
    small = instance([8, 10], 1 << 28)
    large = instance([8, 12], 1 << 29, devices=[NODE], numa_nodes=[0], uring=True,
                     uring_sq_entries=64, cpu_affinity="compact", memory_policy="local")
    pool = PoolDiff(cpus_to_pool=[20], cpus_to_host=[18], devices_to_pool=["0000:0b:00.0"],
                    device_aliases={"0000:0b:00.0": "enp11s0"}, memory_to_pool=[(0, 1 << 27)],
                    memory_to_host=[PoolMemoryRegion(base=0x1840000000, size=0x40000000, node=1)])
    made = {
        "baseline": InstanceExtractor().generate_global_dtb(system({})),
        "create": generator.generate_overlay(system({}), system({"web": large})),
        "remove": generator.generate_removal_overlay("web"),
        "grow": generator.generate_update_overlay("web", small, large, {NODE: NIC}, [],
                                                  0x860000000),
        "shrink": generator.generate_update_overlay("web", large, small, {NODE: NIC},
                                                    [(0x840000000, 1 << 28), (0x850000000, 1 << 28)]),
        "pool": generator.generate_pool_overlay(pool),
    }
    for name, blob in made.items():
        sys.stdout.buffer.write(struct.pack("!HI", len(name), len(blob)) + name.encode() + bytes(blob))


main()
