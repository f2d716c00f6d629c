"""Times kerf on the tree on standard input: seconds to parse and validate it, and to make the overlay of
one change, the best of a few runs each."""

import copy
import sys
import time

from kerf.dtc.overlay import OverlayGenerator
from kerf.dtc.parser import DeviceTreeParser
from kerf.dtc.validator import MultikernelValidator

RUNS = 3


def best(work):
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    blob = sys.stdin.buffer.read()

    def parse_and_validate():
        result = MultikernelValidator().validate(DeviceTreeParser().parse_dtb_from_bytes(blob))
        assert result.is_valid, result.errors

    tree = DeviceTreeParser().parse_dtb_from_bytes(blob)
    before = next(iter(tree.instances.values()))
    after = copy.deepcopy(before)
    after.resources.cpus.pop()
    overlay = best(lambda: OverlayGenerator().generate_update_overlay(before.name, before, after))
    print(best(parse_and_validate), overlay)


main()
