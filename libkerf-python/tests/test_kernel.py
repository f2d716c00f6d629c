"""The kernel's files, emulated; the lock; records."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import libkerf
from conftest import DEADLINE, MIB
from libkerf import Instance, Kernel, Lock, Overlay, Records


def test_an_instance_is_made_changed_and_undone(kernel: Kernel) -> None:
    before = kernel.state()
    applied = kernel.apply(before.allocate("web", cpus=2, memory=256 * MIB))
    assert (applied.transaction, applied.earlier) == (2, ())
    assert kernel.instance_names() == ["web"]
    web = kernel.instance("web")
    assert applied.state.instance("web") == web
    assert web.memory_base
    assert kernel.status("web") == "ready"
    web.validate_resources(kernel.state())
    web.cpus = [*web.cpus, applied.state.free_cpus[0]]
    change = applied.state.overlay_to(applied.state.with_instance(web))
    changed = kernel.apply(change)
    assert kernel.instance("web").cpus == web.cpus
    assert kernel.transactions() == {2, 3}
    kernel.rollback(changed.transaction)
    assert len(kernel.instance("web").cpus) == 2
    gone = Overlay()
    gone.remove("web")
    kernel.apply(gone)
    after = kernel.state()
    assert after.instances == () and sorted(after.free_cpus) == sorted(before.free_cpus)
    assert kernel.pool().kind == "pool"


def test_what_breaks_rules_is_not_written(kernel: Kernel) -> None:
    overlay = Overlay()
    overlay.create(Instance("web", cpus=[9], memory_bytes=MIB))
    with pytest.raises(libkerf.ValidationError, match="cpu-not-free"):
        kernel.apply(overlay)
    assert kernel.transactions() == set()


def test_errors_say_what_the_kernel_said(kernel: Kernel) -> None:
    with pytest.raises(libkerf.KernelError) as missing:
        kernel.instance("none")
    assert missing.value.errno == 2 and missing.value.path
    kernel.apply(kernel.state().allocate("web", cpus=1, memory=MIB))
    with pytest.raises(libkerf.LateError, match="is ready") as late:
        kernel.wait_for("web", "active", 0.05)
    assert isinstance(late.value, TimeoutError)
    # The kernel is not asked: there is nothing loaded.
    with pytest.raises(libkerf.BootError) as boot:
        kernel.boot("web")
    assert boot.value.kind == "state"
    with pytest.raises(libkerf.LoadError) as load:
        kernel.load("web", "/nowhere/vmlinux")
    assert load.value.kind == "file"
    with pytest.raises(libkerf.BootError) as console:
        kernel.console("web", "/nowhere/mktty")
    assert (console.value.kind, console.value.errno) == ("refused", 2)
    with pytest.raises(ValueError, match="not a status"):
        kernel.wait_for("web", "gone")  # type: ignore[arg-type]


def ticks_during(work: Callable[[], object]) -> int:
    """How often another thread of Python's runs while this one works."""
    count = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal count
        while not stop.wait(0.001):
            count += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = count
    work()
    ticks = count - before
    stop.set()
    thread.join(DEADLINE)
    return ticks


def test_others_run_while_something_is_waited_for(kernel: Kernel, tmp_path: Path) -> None:
    kernel.apply(kernel.state().allocate("web", cpus=1, memory=MIB))

    def late() -> None:
        with pytest.raises(libkerf.LateError):
            kernel.wait_for("web", "active", 0.5)

    assert ticks_during(late) > 10

    def locked() -> None:
        with Lock(tmp_path / "lock"), pytest.raises(libkerf.LockError) as refused:
            Lock(tmp_path / "lock", patience=0.5).acquire()
        assert refused.value.kind == "held"

    assert ticks_during(locked) > 10


def test_the_lock_is_kerfs(kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "kerf.lock"
    lock = Lock(path)
    with lock:
        assert path.exists() and lock.is_held
        with pytest.raises(RuntimeError):
            lock.acquire()
    assert not path.exists() and not lock.is_held
    path.write_text("")
    with pytest.raises(libkerf.LockError) as refused:
        Lock(path, 0.05).acquire()
    assert (refused.value.kind, refused.value.path) == ("kerf", str(path))
    # What a process that was killed leaves behind is taken over.
    path.unlink()
    code = "import libkerf, os, sys; k = libkerf.Lock(sys.argv[1]); k.acquire(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, path], check=False)
    assert path.exists()
    with Lock(path, 0.05):
        pass


def test_records_are_kerfs(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.load("web") is None
    image = tmp_path / "vmlinux"
    image.write_bytes(b"\x7fELF Linux version 6.13.1 (a@b)\n\0")
    kernel = libkerf.inspect_kernel(image)
    assert kernel == {
        "path": str(image),
        "size": image.stat().st_size,
        "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
        "format": "vmlinux",
        "compression": None,
        "version": "6.13.1 (a@b)",
    }
    record = {
        "kernel": kernel,
        "initrd": libkerf.inspect_initrd(image),
        "rootfs": None,
        "loaded_at": "2026-01-02T03:04:05+00:00",
        "from-the-future": [1],
    }
    records.save("web", record)
    assert records.load("web") == record
    records.remove("web")
    assert records.load("web") is None
    with pytest.raises(ValueError, match="invalid record"):
        records.save("web", {"kernel": 7})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(libkerf.RecordError) as broken:
        records.load("bad")
    assert broken.value.kind == "content"
