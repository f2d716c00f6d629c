"""What the tests share: an emulated kernel, a real kmorphd, and files to read."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import libkerf

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / "libkerf" / "tests" / "trees"
# Where `cargo build` puts programs.
PROGRAMS = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug"
# The longest wait for anything, in seconds.
DEADLINE = 60.0

MIB = 1 << 20


@pytest.fixture
def baseline() -> libkerf.DeviceTree:
    return libkerf.DeviceTree.load(TREES / "baseline.dts")


def program(name: str) -> Path:
    path = PROGRAMS / name
    assert path.is_file(), f"{path} is not built: scripts/test-python builds it"
    return path


@pytest.fixture
def kernel(baseline: libkerf.DeviceTree) -> Iterator[libkerf.Kernel]:
    """An emulated kernel whose pool has six CPUs, 3 GiB and a network card."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("the kernel's files are emulated with FUSE, which takes root and /dev/fuse")
    emulator = subprocess.Popen(
        [program("kmorph-emulated-kernel")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert emulator.stdin and emulator.stdout
    try:
        root = Path(emulator.stdout.readline().rstrip("\n"))
        kernel = libkerf.Kernel(root, lock=root.parent / "run" / "kerf.lock", patience=0.3)
        with pytest.raises(libkerf.NoPoolError):
            kernel.state()
        kernel.write_baseline(baseline)
        yield kernel
    finally:
        emulator.stdin.close()
        assert emulator.wait(DEADLINE) == 0
        emulator.stdout.close()


class Host:
    """A kmorphd with directories of its own. A guard ends and removes what is left of it, whatever
    becomes of the tests."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kmorph-"))
        self.socket = self.directory / "run" / "kmorphd.sock"
        self.guard = subprocess.Popen(
            [program("kmorph-test-guard"), self.directory], stdin=subprocess.PIPE
        )
        config = self.directory / "kmorphd.conf"
        config.write_text(
            "[defaults]\nheartbeat_timeout_s = 1.0\n[pool]\nshare_cpus = true\nshare_memory = true\nmemory_mib = 65536\n"
            f'[paths]\nstate_dir = "{self.directory}/state"\nrun_dir = "{self.directory}/run"\n'
            f'socket = "{self.socket}"\ncache_dir = "{self.directory}/cache"\n'
        )
        self.log = (self.directory / "kmorphd.log").open("w")
        self.daemon = subprocess.Popen(
            [program("kmorphd"), "--config", config],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        end = time.monotonic() + DEADLINE
        while True:
            try:
                libkerf.Daemon(self.socket).status()
                return
            except libkerf.UnreachableError:
                assert self.daemon.poll() is None, Path(self.log.name).read_text()
                assert time.monotonic() < end, "kmorphd does not answer"
                time.sleep(0.01)

    def image(self, release: str) -> Path:
        """A file that has a kernel's header, and nothing to boot."""
        image = bytearray(8192)
        image[0x1F1] = 1
        image[0x1FE:0x200] = b"\x55\xaa"
        image[0x202:0x206] = b"HdrS"
        image[0x206:0x208] = (0x20F).to_bytes(2, "little")
        image[0x20E:0x210] = (0x300).to_bytes(2, "little")
        version = release.encode() + b" (test@test) #1\0"
        image[0x500 : 0x500 + len(version)] = version
        path = self.directory / f"vmlinuz-{release}"
        path.write_bytes(image)
        return path

    def close(self) -> None:
        self.daemon.kill()
        self.daemon.wait(DEADLINE)
        self.log.close()
        assert self.guard.stdin
        self.guard.stdin.close()
        assert self.guard.wait(DEADLINE) == 0
        assert not self.directory.exists()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    try:
        yield host
    finally:
        host.close()
