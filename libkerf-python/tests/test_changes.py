"""Overlays, allocation, exchange: planned and tried without a kernel."""

from __future__ import annotations

import pytest

import libkerf
from conftest import MIB
from libkerf import DeviceTree, Instance, Machine, Overlay, State


@pytest.fixture
def pool(baseline: DeviceTree) -> State:
    return State.from_device_tree(baseline)


def test_an_instance_is_allocated(pool: State) -> None:
    overlay = pool.allocate("web", cpus=2, memory=256 * MIB, id=7)
    assert overlay.operations == (("/instances", "instance-create"),)
    made = pool.apply(overlay)
    web = made.instance("web")
    assert (len(web.cpus), web.memory_bytes, web.id) == (2, 256 * MIB, 7)
    assert set(web.cpus) | set(made.free_cpus) == set(pool.cpus)
    assert pool.instances == (), "a state does not change"
    assert made.status("web") == "ready"
    for kind, cpus, memory in [("cpus", 7, MIB), ("memory", 1, 4 << 30), ("senseless", 0, MIB)]:
        with pytest.raises(libkerf.ShortageError) as shortage:
            made.allocate("db", cpus=cpus, memory=memory)
        assert shortage.value.kind == kind
    with pytest.raises(libkerf.ShortageError) as shortage:
        made.allocate("web", cpus=1, memory=MIB)
    assert shortage.value.kind == "name-taken"


def test_the_overlay_of_a_change_makes_it(pool: State) -> None:
    before = pool.apply(pool.allocate("web", cpus=2, memory=256 * MIB))
    web = before.instance("web")
    web.cpus = [web.cpus[0], before.free_cpus[0]]
    after = before.with_instance(web)
    overlay = before.overlay_to(after)
    assert before.apply(overlay).instance("web").cpus == web.cpus
    assert before.overlay_to(before).is_empty
    web.id = 99
    fixed = before.with_status("web", "ready")
    with pytest.raises(libkerf.ChangeError) as refused:
        fixed.overlay_to(fixed.with_instance(web))
    assert refused.value.kind == "fixed"
    assert before.overlay_to(before.without_instance("web")).operations == (
        ("/instances", "instance-remove"),
    )
    with pytest.raises(libkerf.ValidationError, match="instance-running"):
        busy = before.with_status("web", "active")
        busy.apply(before.overlay_to(before.without_instance("web")))


def test_a_live_pool_is_reshaped(pool: State, baseline: DeviceTree) -> None:
    assert pool.reshape(baseline).is_empty
    grown = pool.reshape(baseline, memory="2GB@0,4GB@1")
    assert grown.operations == (("/resources", "memory-add"),)
    assert pool.apply(grown).free_bytes(1) == 4 << 30
    baseline.set_u64s("/resources", "cpus", pool.cpus[1:])
    assert pool.reshape(baseline).operations == (("/resources", "cpu-remove"),)
    with pytest.raises(ValueError, match="invalid size"):
        pool.reshape(baseline, memory="2XB@0")


def test_an_exchange_is_planned(pool: State) -> None:
    state = pool.apply(pool.allocate("old", cpus=2, memory=256 * MIB))
    state = state.apply(state.allocate("new", cpus=1, memory=256 * MIB))
    old = state.instance("old")
    made = state.apply(state.plan_exchange("old", "new", everything=True))
    assert set(old.cpus) < set(made.instance("new").cpus)
    with pytest.raises(KeyError):
        made.instance("old")
    some = state.apply(state.plan_exchange("old", "new", cpus=old.cpus[:1]))
    assert some.instance("old").cpus == old.cpus[1:]
    for kind, pair in {"itself": ("old", "old"), "unknown": ("none", "new")}.items():
        with pytest.raises(libkerf.ExchangeError) as refused:
            state.plan_exchange(*pair)
        assert refused.value.kind == kind
    with pytest.raises(ValueError, match="everything"):
        state.plan_exchange("old", "new", cpus=[8], everything=True)


def test_overlays_are_built_written_and_read(pool: State) -> None:
    overlay = Overlay(note="by hand")
    overlay.create(Instance("web", cpus=[8], memory_bytes=64 * MIB))
    overlay.add_cpus([10, 12], "web")
    overlay.remove_cpus([12], "web")
    overlay.add_memory(64 * MIB, "web")
    overlay.add_devices(["0000:09:00.0"], "web")
    overlay.add_memory(64 * MIB, node=0)
    made = pool.apply(overlay)
    web = made.instance("web")
    assert (web.cpus, web.memory_bytes, len(web.devices)) == ((8, 10), 128 * MIB, 1)
    again = Overlay.from_device_tree(DeviceTree.from_bytes(overlay.to_bytes()))
    assert again == overlay
    assert overlay.to_device_tree().validate(state=pool).is_valid
    gone = Overlay()
    gone.remove_devices(["0000:09:00.0"], "web")
    gone.remove("web")
    assert made.apply(gone).instances == ()
    with pytest.raises(ValueError, match="PCI address"):
        overlay.add_devices(["nic"])
    chunk = Overlay()
    chunk.remove_memory(0x1000, 0x1000)
    with pytest.raises(libkerf.ValidationError, match="memory-not-held"):
        pool.apply(chunk)


def test_what_the_kernel_would_cut_is_split() -> None:
    overlay = Overlay()
    overlay.add_cpus(list(range(1000)))
    parts = overlay.split()
    assert len(parts) > 1
    assert all(len(part.to_bytes()) <= 4096 for part in parts)
    with pytest.raises(libkerf.UnsplittableError):
        large = Overlay(note="x" * 5000)
        large.add_cpus([1])
        large.split()


def test_a_machine_is_read() -> None:
    machine = Machine.read()
    assert machine.cpus and machine.cpus[0] == machine.cpus[0]
    assert machine.memory_block >= 1 << 20
    with pytest.raises(OSError):
        Machine.read("/nowhere")
