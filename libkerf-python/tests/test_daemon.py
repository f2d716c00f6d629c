"""A real kmorphd, with instances of the embedded backend."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import libkerf
from conftest import DEADLINE, MIB, Host
from libkerf import Daemon, Instance


def test_an_instance_is_spawned_watched_and_ended(host: Host) -> None:
    daemon = Daemon(host.socket)
    assert daemon.socket == host.socket
    assert daemon.status()["backend"] == "embedded"
    instance = Instance("web", cpus=[0], memory_bytes=64 * MIB)
    status = instance.spawn(
        kernel=host.image("6.8.0"),
        workload=["kmorph-kv"],
        env={"A": "b"},
        publish=[("127.0.0.1", 0, 6379)],
        timeout=DEADLINE,
        socket=host.socket,
    )
    assert (status["name"], status["state"]) == ("web", "running")
    assert status["kernel_release"] == "6.8.0"
    assert status["memory_bytes"] == 64 * MIB
    listen, port = status["published"][0]["listen"].rsplit(":", 1)
    with socket.create_connection((listen, int(port)), DEADLINE) as client:
        client.sendall(b"PING\r\n")
        assert client.recv(100) == b"+PONG\r\n"

    with instance.monitor(heartbeat_timeout=5, socket=host.socket) as monitor:
        assert daemon.heartbeat("web")["timeout_ms"] == 5000
        assert monitor.wait_for("running", DEADLINE)["policy"]["heartbeat_timeout_s"] == 5
        assert monitor.heartbeat()["monitored"] is True
        assert monitor.health()["name"] == "web"
        # It fails, and is healed: the events tell.
        os.kill(status["processes"]["agent"], signal.SIGKILL)
        end = time.monotonic() + DEADLINE
        kinds = set()
        for event in monitor:
            assert event["instance"] == "web"
            kinds.add(event["kind"])
            if event["kind"] == "instance_state" and event["generation"] == 2:
                if monitor.status()["state"] == "running":
                    break
            assert time.monotonic() < end, kinds
        assert {"instance_state", "detector", "recovery"} <= kinds
        assert monitor.status()["generation"] == 2
    with pytest.raises(RuntimeError, match="closed"):
        monitor.wait_for("failed", DEADLINE)
    assert list(monitor) == []

    assert daemon.set_policy("web", auto_heal=False)["auto_heal"] is False
    assert [i["name"] for i in daemon.instances()] == ["web"]
    daemon.terminate("web", timeout=DEADLINE)
    assert daemon.instances() == []


def test_refusals_name_their_kind(host: Host, tmp_path: Path) -> None:
    daemon = Daemon(host.socket)
    with pytest.raises(libkerf.DaemonError) as refused:
        daemon.instance("a/../b")
    assert refused.value.code in ("not_found", "invalid_request")
    with pytest.raises(libkerf.DaemonError) as refused:
        Instance("none").monitor(5, socket=host.socket)
    assert refused.value.code == "not_found"
    not_a_kernel = tmp_path / "image"
    not_a_kernel.write_bytes(b"no")
    with pytest.raises(libkerf.DaemonError) as refused:
        Instance("bad").spawn(not_a_kernel, timeout=DEADLINE, socket=host.socket)
    assert refused.value.code == "bad_kernel_image"
    with pytest.raises(libkerf.DaemonError, match="boots no kernel"):
        Instance("bad").spawn(
            host.image("6.8.0"), cmdline="quiet", timeout=DEADLINE, socket=host.socket
        )
    with pytest.raises(libkerf.DaemonError) as refused:
        daemon.request("POST", "/v1/instances", {"name": "x", "nonsense": 1})
    assert refused.value.code == "invalid_request"
    with pytest.raises(ValueError, match="spaces"):
        daemon.request("GET", "/v1/daemon HTTP/1.0\r\nX: y")
    assert daemon.request("GET", "/v1/policies") == {"instance": {}}


def test_the_daemon_is_found(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMORPH_SOCKET", str(host.socket))
    assert Daemon().status()["instances"] == 0
    with pytest.raises(libkerf.UnreachableError, match="kmorphctl daemon start") as unreachable:
        Daemon(tmp_path / "none").status()
    assert isinstance(unreachable.value, ConnectionError)


class Deaf:
    """Takes connections and says nothing."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()

    def __enter__(self) -> Deaf:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()


@contextmanager
def interruptible(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A program that Ctrl-C ends, also where it is ignored: that is inherited, as from a script's background."""
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", heed + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_ends_a_wait(host: Host) -> None:
    """Also one without an end: for the next event."""
    code = """if True:
        import libkerf, sys
        instance = libkerf.Instance("quiet")
        instance.spawn(sys.argv[1], socket=sys.argv[2])
        monitor = instance.monitor(socket=sys.argv[2])
        while monitor.next_event(1.0):
            pass
        print("waits", flush=True)
        for event in monitor:
            pass
    """
    with interruptible(code, host.image("6.8.0"), host.socket) as waiter:
        assert waiter.stdout and waiter.stdout.readline() == "waits\n"
        waiter.send_signal(signal.SIGINT)
        _, errors = waiter.communicate(timeout=DEADLINE)
    assert "KeyboardInterrupt" in errors
    Daemon(host.socket).terminate("quiet", timeout=DEADLINE)


def test_ctrl_c_ends_a_request_to_a_daemon_that_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    code = "import libkerf, sys; libkerf.Daemon(sys.argv[1]).status()"
    with Deaf(path) as deaf, interruptible(code, path) as asker:
        connection, _ = deaf.listener.accept()
        with connection:
            assert connection.recv(10)
            asker.send_signal(signal.SIGINT)
            # Less than it waits for an answer.
            _, errors = asker.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors


def test_closing_wakes_who_waits_for_an_event(host: Host) -> None:
    Instance("quiet").spawn(host.image("6.8.0"), timeout=DEADLINE, socket=host.socket)
    monitor = Instance("quiet").monitor(socket=host.socket)
    seen: list[object] = []
    waiter = threading.Thread(target=lambda: seen.extend(monitor))
    waiter.start()
    monitor.close()
    waiter.join(DEADLINE)
    assert not waiter.is_alive()
    Daemon(host.socket).terminate("quiet", force=True, timeout=DEADLINE)


def test_an_answer_that_makes_no_sense_is_no_crash(tmp_path: Path) -> None:
    for answer in [b"", b"nonsense", b"HTTP/1.0 200 OK\r\n\r\n\xff", b"HTTP/1.0 500 X\r\n\r\n<html>"]:
        path = tmp_path / "socket"
        with Deaf(path) as deaf:

            def reply() -> None:
                connection, _ = deaf.listener.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(answer)

            thread = threading.Thread(target=reply)
            thread.start()
            with pytest.raises(libkerf.DaemonError):
                Daemon(path).status()
            thread.join(DEADLINE)
        path.unlink()
