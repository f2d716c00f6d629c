"""Trees: read, judged, changed, written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import libkerf
from conftest import MIB, ROOT, TREES
from libkerf import DeviceTree, Instance, State


def test_source_and_blob_are_read_and_written_unchanged(tmp_path: Path) -> None:
    for source in sorted(TREES.glob("*.dts")):
        tree = DeviceTree.load(source)
        assert tree.to_source() == source.read_text()
        blob = tmp_path / "tree.dtb"
        tree.save(blob)
        dtc = subprocess.run(["dtc", "-q", "-I", "dts", "-O", "dtb", source], capture_output=True)
        assert blob.read_bytes() == dtc.stdout, source
        again = DeviceTree.load(blob)
        assert again == tree
        assert again.to_bytes() == blob.read_bytes()
        again.save(tmp_path / "tree.dts")
        assert DeviceTree.load(tmp_path / "tree.dts") == tree
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree.dtb", "tree.dts"]


def test_kerfs_old_text_is_read() -> None:
    examples = sorted((ROOT / "libkerf" / "tests" / "kerf-examples").glob("*.dts"))
    read = 0
    for example in examples:
        try:
            tree = DeviceTree.load(example)
        except libkerf.KerfTextError:
            continue
        read += 1
        assert tree.kind == "baseline"
        assert tree.get_u64s("/resources", "cpus")
    assert read > 0


def test_broken_input_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(libkerf.SourceError) as source:
        DeviceTree.from_source("/dts-v1/;\n/ { a = <; };")
    assert (source.value.line, source.value.column) > (1, 1)
    with pytest.raises(libkerf.BlobError) as blob:
        DeviceTree.from_bytes(bytes.fromhex("d00dfeed") + bytes(60))
    assert isinstance(blob.value.offset, int)
    for error in (source.value, blob.value):
        assert isinstance(error, (libkerf.TreeError, libkerf.KerfError, ValueError))
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as no_file:
        DeviceTree.load(missing)
    assert no_file.value.filename == str(missing) and str(missing) in str(no_file.value)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, baseline: DeviceTree) -> None:
    taken = tmp_path / "taken.dts"
    taken.mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        baseline.save(taken)
    assert refused.value.filename == str(taken)
    assert list(tmp_path.iterdir()) == [taken]


def test_everything_that_is_wrong_is_found(baseline: DeviceTree) -> None:
    assert baseline.kind == "baseline"
    report = baseline.validate()
    assert report.is_valid and not report.errors and not report.kernel_refuses
    baseline.set_u64s("/resources/memory@0", "size", [4097])
    baseline.set_texts("/resources/devices/nic9", "device-type", ["pci"])
    report = baseline.validate()
    assert not report.is_valid
    assert {"memory-size", "pci-incomplete"} <= set(report.rules)
    finding = next(f for f in report.errors if f.rule == "memory-size")
    assert (finding.path, finding.property) == ("/resources/memory@0", "size")
    assert (finding.severity, finding.kernel) == ("error", "refuses")
    assert "4097" in finding.problem and finding.suggestion
    assert str(finding) in str(report)
    with pytest.raises(libkerf.ValidationError, match="memory-size") as refused:
        State.from_device_tree(baseline)
    assert refused.value.report.rules == report.rules


def test_properties_have_forms(baseline: DeviceTree) -> None:
    tree = baseline
    tree.set_u32s("/a/b", "cells", [1, 2])
    assert tree.get_u32s("/a/b", "cells") == [1, 2]
    assert tree.get_u64s("/a/b", "cells") == [(1 << 32) + 2]
    assert tree.get_bytes("/a/b", "cells") == bytes([0, 0, 0, 1, 0, 0, 0, 2])
    tree.set_texts("/a/b", "names", ["x", "yz"])
    assert tree.get_texts("/a/b", "names") == ["x", "yz"]
    tree.set_bytes("/a/b", "flag", b"")
    assert tree.properties("/a/b") == ["cells", "names", "flag"]
    assert tree.children("/a") == ["b"]
    with pytest.raises(ValueError, match="names"):
        tree.get_u32s("/a/b", "names")
    with pytest.raises(ValueError, match="NUL"):
        tree.set_texts("/a", "bad", ["x\0y"])
    tree.remove("/a/b", "names")
    for path, name in [("/a/b", "names"), ("/a/c", "x")]:
        with pytest.raises(KeyError):
            tree.get_bytes(path, name)
    tree.remove("/a")
    assert "a" not in tree.children()
    with pytest.raises(KeyError):
        tree.remove("/a")
    with pytest.raises(ValueError):
        tree.remove("/")


def instance() -> Instance:
    return Instance("web-server", cpus=[8, 10], memory_bytes=256 * MIB, id=3)


def test_the_api_that_kerfs_users_know(tmp_path: Path) -> None:
    tree = instance().to_device_tree()
    tree.set_texts("/", "vendor,note", ["kept"])
    tree.save(tmp_path / "web-server.dts")

    dt = DeviceTree.load(tmp_path / "web-server.dts")
    web = Instance.from_device_tree(dt)
    assert web == instance()
    web.validate_resources()
    saved = tmp_path / "instances"
    assert web.save(saved) == saved / "web-server.dts"
    again = Instance.load("web-server", saved)
    assert again == web
    again.cpus = [8]
    again.save(saved)
    again = Instance.load("web-server", saved)
    assert again.cpus == (8,)
    assert again.to_device_tree().get_texts("/", "vendor,note") == ["kept"]
    with pytest.raises(libkerf.InstanceNotFoundError, match="nobody"):
        Instance.load("nobody", saved)
    with pytest.raises(libkerf.RecordError) as refused:
        Instance("../x").save(saved)
    assert refused.value.kind == "name"


def test_resources_are_judged_by_the_pool(baseline: DeviceTree) -> None:
    pool = State.from_device_tree(baseline)
    assert pool.cpus == pool.free_cpus == (8, 10, 12, 14, 16, 18)
    assert pool.free_bytes() == pool.memory_bytes == 3 << 30
    web = instance()
    assert web.validate_resources(pool).is_valid
    web.cpus = [8, 9]
    web.devices = ["nic7"]
    with pytest.raises(libkerf.ValidationError) as refused:
        web.validate_resources(pool)
    assert {"cpu-not-free", "device-unknown"} & set(refused.value.report.rules)
    web = instance()
    web.memory_bytes = 5000
    with pytest.raises(libkerf.ValidationError, match="instance-memory-size"):
        web.validate_resources()
    # In a tree with a pool, that is what it is judged by.
    tree = pool.with_instance(instance()).to_device_tree()
    assert [i.name for i in tree.instances()] == ["web-server"]
    report = Instance.from_device_tree(tree).validate_resources()
    assert not tree.validate().is_valid, "what is wrong elsewhere is not said of the instance"
    assert all(f.path.startswith("/instances/web-server") for f in report.findings)
    tree.set_u64s("/instances/web-server/resources", "cpus", [8, 99])
    with pytest.raises(libkerf.ValidationError, match="99"):
        Instance.from_device_tree(tree).validate_resources()


def test_an_instance_is_judged_beside_the_others(baseline: DeviceTree) -> None:
    pool = State.from_device_tree(baseline)
    other = Instance("other", cpus=[10], memory_bytes=MIB, id=4)
    with pytest.raises(libkerf.ValidationError, match="CPU 10 belongs to other"):
        instance().validate_resources(pool.with_instance(other))
    # Its own share is not in its way.
    instance().validate_resources(pool.with_instance(instance()))


def test_one_of_several_instances_is_named(baseline: DeviceTree) -> None:
    pool = State.from_device_tree(baseline)
    other = Instance("other", cpus=[12], memory_bytes=MIB, id=4)
    tree = pool.with_instance(instance()).with_instance(other).to_device_tree()
    assert Instance.from_device_tree(tree, "other") == other
    with pytest.raises(ValueError, match="several"):
        Instance.from_device_tree(tree)
    for missing in (tree, baseline):
        with pytest.raises(KeyError):
            Instance.from_device_tree(missing, "none")
