"""Says what kerf 0.1 reads in each text on standard input: `!I` and the text; the answer likewise."""

import struct
import sys
from pathlib import Path

sys.path.insert(0, str(next(Path(sys.prefix).glob("kerf-0.1.*"))))

from kerf.dtc.parser import DeviceTreeParser  # pylint: disable=wrong-import-position


def numbers(values):
    return " ".join(map(str, values or []))


def describe(tree):
    memory = tree.hardware.memory
    yield f"cpus {numbers(tree.hardware.cpus.available)}"
    yield f"memory {memory.memory_pool_base} {memory.memory_pool_bytes}"
    for name, device in tree.hardware.devices.items():
        yield f"device {name} {numbers(device.available_vfs)} / {numbers(device.available_ns)}"
    for name, instance in tree.instances.items():
        own = instance.resources
        kcore = bool((instance.options or {}).get("enable-host-kcore"))
        yield (f"instance {name} {instance.id} {numbers(own.cpus)} / {own.memory_base} {own.memory_bytes} / "
               f"{' '.join(filter(None, own.devices))} / {numbers(own.numa_nodes)} {own.cpu_affinity or '-'} "
               f"{own.memory_policy or '-'} {int(kcore)}")
    for name, reference in tree.device_references.items():
        yield (f"reference {name} {reference.get('parent', '-')} {reference.get('vf_id', '-')} "
               f"{reference.get('namespace_id', '-')}")


def main():
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while header := source.read(4):
        text = source.read(struct.unpack("!I", header)[0]).decode()
        try:
            answer = "\n".join(describe(DeviceTreeParser().parse_dts(text)))
        except Exception as error:  # pylint: disable=broad-except
            answer = f"refused: {error}"
        answer = answer.encode()
        sink.write(struct.pack("!I", len(answer)) + answer)
        sink.flush()


main()
