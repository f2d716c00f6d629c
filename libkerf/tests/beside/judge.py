"""Says of each tree on standard input whether kerf takes it.

One process imports kerf once. A request is `!BHI`: what the tree is to be, how many chunks of pool
memory /proc/iomem is to have, and the tree's length; then the chunks, `!QQ` each, and the tree. The
answer is `!BI` and a text: 1 and nothing when kerf takes it, else 0 and why not.
"""

import struct
import sys

from kerf.baseline import BaselineManager
from kerf.dtc import validator as validation
from kerf.dtc.parser import DeviceTreeParser

BASELINE, SYSTEM, INSTANCE, OVERLAY = range(4)


def judge(kind, blob):
    """Raises what kerf raises."""
    parser = DeviceTreeParser()
    if kind == INSTANCE:
        parser.parse_instance_dtb_from_bytes(blob)
        return
    tree = parser.parse_dtb_from_bytes(blob)
    if kind == OVERLAY:
        return
    if kind == BASELINE:
        BaselineManager().validate_baseline(tree)
    result = validation.MultikernelValidator().validate(tree)
    if not result.is_valid:
        raise ValueError("; ".join(result.errors))


def main():
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while header := source.read(7):
        kind, count, length = struct.unpack("!BHI", header)
        chunks = list(struct.iter_unpack("!QQ", source.read(16 * count)))
        validation.get_pool_chunks_from_iomem = lambda chunks=chunks: chunks
        blob = source.read(length)
        try:
            judge(kind, blob)
            reason = ""
        except Exception as error:  # pylint: disable=broad-except
            reason = f"{type(error).__name__}: {error}"
        text = reason.encode()
        sink.write(struct.pack("!BI", not reason, len(text)) + text)
        sink.flush()


main()
