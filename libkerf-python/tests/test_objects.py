"""What Python expects of objects: copies, pickles, truth, buffers, signals, errors in its own words."""

from __future__ import annotations

import array
import copy
import importlib.metadata
import mmap
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import libkerf
from conftest import MIB, TREES
from libkerf import DeviceTree, Instance, Kernel, Machine, Overlay, State

# The ways in which an object becomes another one that is the same.
COPIES: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    lambda thing: pickle.loads(pickle.dumps(thing)),
    lambda thing: pickle.loads(pickle.dumps(thing, protocol=0)),
]


def virtio() -> Overlay:
    return Overlay.from_device_tree(DeviceTree.load(TREES / "virtio.dts"))


def test_the_version_is_that_of_the_package() -> None:
    assert libkerf.__version__ == importlib.metadata.version("libkerf")


@pytest.mark.parametrize("again", COPIES)
def test_trees_are_copied(again: Callable[[Any], Any]) -> None:
    for source in sorted(TREES.glob("*.dts")):
        tree = DeviceTree.load(source)
        assert again(tree) == tree
        assert again(tree).to_source() == source.read_text(), "unchanged, it is written as it was"
        blob = DeviceTree.from_bytes(tree.to_bytes())
        assert again(blob).to_bytes() == tree.to_bytes()
    deep = DeviceTree.load(TREES / "baseline.dts")
    deep.set_u32s("/n" * 60, "x", [1])
    other = again(deep)
    assert other == deep
    other.set_u32s("/", "x", [1])
    assert other != deep, "a copy is a tree of its own"


@pytest.mark.parametrize("again", COPIES)
def test_what_is_made_of_trees_is_copied(
    again: Callable[[Any], Any], baseline: DeviceTree
) -> None:
    web = Instance("web", cpus=[8], memory_bytes=64 * MIB, id=3)
    overlay = Overlay(note="why")
    overlay.create(web)
    overlay.add_cpus([10], "web")
    state = State.from_device_tree(baseline).apply(overlay).with_status("web", "active")
    machine = Machine.read()
    for thing in (web, overlay, virtio(), state, machine.cpus[0]):
        assert again(thing) == thing
    assert again(virtio()).to_bytes() == virtio().to_bytes()
    assert again(state).status("web") == "active"
    assert again(machine).cpus == machine.cpus
    assert again(overlay.split()) == overlay.split()
    baseline.set_u64s("/resources/memory@0", "size", [4097])
    report = baseline.validate()
    assert str(again(report)) == str(report)
    assert str(again(report.errors[0])) == str(report.errors[0])


@pytest.mark.parametrize("again", COPIES)
def test_an_instance_keeps_its_tree_in_a_copy(again: Callable[[Any], Any]) -> None:
    tree = Instance("web", cpus=[8], memory_bytes=64 * MIB, id=3).to_device_tree()
    tree.set_texts("/", "vendor,note", ["kept"])
    web = again(Instance.from_device_tree(tree))
    web.cpus = [10]
    assert web.to_device_tree().get_texts("/", "vendor,note") == ["kept"]


def test_errors_are_pickled() -> None:
    broken = DeviceTree.load(TREES / "baseline.dts")
    broken.set_u64s("/resources/memory@0", "size", [4097])
    raised: list[Exception] = []
    for attempt in (
        lambda: DeviceTree.from_source("/dts-v1/;\n/ { a = <; };"),
        lambda: DeviceTree.from_bytes(b"\xd0\x0d\xfe\xed"),
        lambda: State.from_device_tree(broken),
    ):
        with pytest.raises(libkerf.KerfError) as refused:
            attempt()
        raised.append(refused.value)
    for error in raised:
        other = pickle.loads(pickle.dumps(error))
        assert type(other) is type(error) and str(other) == str(error)
    assert pickle.loads(pickle.dumps(raised[0])).line == 2


def test_a_report_is_true_when_nothing_forbids_the_tree(baseline: DeviceTree) -> None:
    assert baseline.validate()
    baseline.set_u64s("/resources/memory@0", "size", [4097])
    assert not baseline.validate()
    # Warnings do not forbid it.
    odd = DeviceTree.load(TREES / "virtio.dts").validate()
    assert odd.warnings and odd


def test_whatever_has_a_buffer_is_read(baseline: DeviceTree, tmp_path: Path) -> None:
    blob = baseline.to_bytes()
    file = tmp_path / "tree.dtb"
    file.write_bytes(blob)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for data in (bytearray(blob), memoryview(blob), array.array("B", blob), mapped):
            assert DeviceTree.from_bytes(data).to_bytes() == blob
    assert DeviceTree.from_bytes(memoryview(blob + blob)[: len(blob)]) == baseline
    every_other = bytes(byte for value in blob for byte in (value, 0))
    assert DeviceTree.from_bytes(memoryview(every_other)[::2]) == baseline
    baseline.set_bytes("/", "x", memoryview(b"\1\2"))
    assert baseline.get_bytes("/", "x") == b"\1\2"
    with pytest.raises(TypeError, match="bytes-like object is required, not 'str'"):
        DeviceTree.from_bytes("text")  # type: ignore[arg-type]


def test_lists_that_write_nothing_cannot_be_written() -> None:
    web = Instance("web", cpus=[8, 10], devices=["nic"], numa_nodes=[0])
    state = State.from_device_tree(DeviceTree.load(TREES / "baseline.dts"))
    report = DeviceTree.load(TREES / "virtio.dts").validate()
    for value in (
        web.cpus,
        web.devices,
        web.numa_nodes,
        state.instances,
        state.cpus,
        state.free_cpus,
        state.devices,
        report.findings,
        report.errors,
        report.warnings,
        report.rules,
        virtio().operations,
        Machine.read().cpus,
        DeviceTree.load(TREES / "baseline.dts").remarks,
    ):
        assert isinstance(value, tuple), value
    web.cpus = (*web.cpus, 12)
    assert web.cpus == (8, 10, 12)
    web.cpus = {14}
    assert web.cpus == (14,)


def test_arguments_are_refused_in_pythons_words() -> None:
    web = Instance("web")
    for value in (-1, 1 << 64):
        with pytest.raises(OverflowError, match=f"in range 0 to {2**64 - 1}, not {value}"):
            web.cpus = [value]
    with pytest.raises(OverflowError, match=f"in range 0 to {2**32 - 1}, not {2**40}"):
        web.id = 1 << 40
    with pytest.raises(TypeError, match="expected a sequence of items, not str"):
        web.devices = "nic"
    with pytest.raises(TypeError, match="expected str, not int"):
        web.devices = [1]  # type: ignore[list-item]
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        web.cpus = ["8"]  # type: ignore[list-item]
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        Overlay().add_cpus(8)  # type: ignore[arg-type]
    with pytest.raises(OverflowError, match="-1"):
        Overlay().add_memory(-1)
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        Overlay().add_memory(1.5)  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        DeviceTree.load(TREES / "baseline.dts").set_u32s("/", "x", [1 << 32])


class Stop(Exception):
    pass


def test_a_signal_ends_the_reading_of_a_text() -> None:
    # In a build for tests it takes half a second to read.
    text = "/dts-v1/;\n/ { a = /bits/ 8 <" + "1 " * 900_000 + ">; };\n"

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stop

    start = time.thread_time()
    DeviceTree.from_source(text)
    whole = time.thread_time() - start
    start = time.thread_time()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Stop):
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            DeviceTree.from_source(text)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Of this thread's CPU, so that other work does not count.
    assert time.thread_time() - start < whole / 4


def test_an_overlay_keeps_its_virtio_devices() -> None:
    tree = DeviceTree.load(TREES / "virtio.dts")
    written = DeviceTree.from_bytes(Overlay.from_device_tree(tree).to_bytes())
    path = "/fragment@0/__overlay__/instance-create/resources/virtio/net@0"
    assert written.get_u32s(path, "queues") == [2]
    assert written.get_u32s(path, "queue-size") == [256]


# The design's own example, as far as it goes without kmorphd.
EXAMPLE = """
from libkerf import DeviceTree, Instance
dt = DeviceTree.load("/var/lib/kerf/instances/web-server.dts")
instance = Instance.from_device_tree(dt)
instance.validate_resources(); instance.save()
instance = Instance.load("web-server")
print(instance.name, instance.cpus)
try:
    DeviceTree.load("/var/lib/kerf/instances/nobody.dts")
except FileNotFoundError as error:
    print(error.filename)
"""


def test_the_running_kernels_tree_is_loaded_where_kerf_wrote_none(
    kernel: Kernel, tmp_path: Path
) -> None:
    overlay = Overlay()
    overlay.create(Instance("web-server", cpus=[8], memory_bytes=64 * MIB, id=3))
    kernel.apply(overlay)
    (tmp_path / "sys" / "multikernel").mkdir(parents=True)
    (tmp_path / "lib" / "kerf" / "instances").mkdir(parents=True)
    root = os.fspath(kernel_root(kernel))
    # In a mount namespace of its own the kernel's files and kerf's directory are where they always are.
    script = (
        f'mount --rbind "{root}" "{tmp_path}/sys/multikernel" && '
        f'mount --rbind "{tmp_path}/sys" /sys/fs && '
        f'mount --rbind "{tmp_path}/lib" /var/lib && exec "$0" -c "$1"'
    )
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, EXAMPLE],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "web-server (8,)",
        "/var/lib/kerf/instances/nobody.dts",
    ]
    assert (tmp_path / "lib" / "kerf" / "instances" / "web-server.dts").exists()


def kernel_root(kernel: Kernel) -> Path:
    """Where the files of an emulated kernel are: an error names one of them."""
    with pytest.raises(libkerf.KernelError) as error:
        kernel.instance("none")
    assert error.value.path
    return Path(error.value.path).parents[2]
