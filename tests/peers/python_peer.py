#!/usr/bin/env python3
"""A KMP peer in Python, written from docs/kmp.md alone, with the standard library only.

    python_peer.py golden <folder>                         reads and writes again every golden frame
    python_peer.py serve <socket> <instance> <generation> [<key>]
                                                           is that instance, behind a Unix socket

It exists to prove that the page is enough, and it is what a peer in another language can start from.
"""

import hmac
import os
import pathlib
import socket
import sys
import threading
import time

# Nothing is left beside the two files.
sys.dont_write_bytecode = True
from kmp_frames import (
    BAD_VERSION,
    ENDING,
    FRAME_TIMEOUT_S,
    HELLO,
    HELLO_TIMEOUT_S,
    MORE,
    NOT_AUTHENTIC,
    NOT_FENCED,
    OLDER_DAEMON,
    PORT,
    REPLY,
    STALE,
    TOPOLOGY_MAX,
    UNEXPECTED,
    VERSION,
    WRONG_PEER,
    fixed,
    layout,
    read_frame,
    Refused,
    write_frame,
)

# --- The instance. ---


class Instance:
    def __init__(self, name, generation, key=None):
        self.name, self.generation, self.boot_id = name, generation, os.urandom(16)
        self.key, self.incarnation = key, 0
        self.parts = None

    def proof(self, label, hello, reply):
        """What the side with this label sends, for this HELLO and reply."""
        said = label.ljust(16, b"\0")
        for one in (hello, reply):
            said += fixed(HELLO[0])[1](one) + (one["nonce"] or bytes(32))
        return hmac.digest(self.key, said + hello["instance"].encode(), "sha256")

    def identity(self, asked):
        reply = self.who(asked)
        if self.key:
            reply["nonce"] = os.urandom(32)
            reply["proof"] = self.proof(b"KMP1 instance", asked, reply)
        return reply

    def not_older(self, hello):
        if hello["incarnation"] < self.incarnation:
            raise Refused(OLDER_DAEMON, f"daemon {self.incarnation} has spoken")

    def authenticate(self, hello, reply, request):
        if not hmac.compare_digest(request["proof"], self.proof(b"KMP1 daemon", hello, reply)):
            raise Refused(NOT_AUTHENTIC, "this is not the proof of the key")
        self.not_older(hello)
        self.incarnation = hello["incarnation"]

    def who(self, asked):
        return {
            "version_min": 1,
            "version_max": 1,
            "role": 2,
            "channel": asked["channel"],
            "flags": 0,
            "generation": self.generation,
            "boot_id": self.boot_id,
            "features": 0,
            "session": asked["session"],
            "incarnation": self.incarnation,
            "nonce": None,
            "proof": None,
            "instance": self.name,
            "kernel_release": os.uname().release,
            "agent_version": "python_peer 1",
        }

    def welcome(self, hello):
        if not hello["version_min"] <= VERSION <= hello["version_max"]:
            raise Refused(BAD_VERSION, "only version 1 is spoken here")
        if hello["role"] != 1 or hello["instance"] != self.name:
            raise Refused(WRONG_PEER, f"this is {self.name}, for its daemon")
        if hello["generation"] != self.generation:
            raise Refused(STALE, f"this is generation {self.generation}")
        if self.key:
            self.not_older(hello)
            if not hello["nonce"]:
                raise Refused(NOT_AUTHENTIC, "only a daemon with the key is answered")

    def collect(self, part):
        """Takes a part of a topology; it is whole when the last has come."""
        before, self.parts = self.parts, None
        more, entries = part["flags"] & MORE, part["topology"]
        same = ("recovery", "failed_generation", "new_generation", "outcome", "instance")
        if part["part"] and (
            not before
            or part["part"] != before["part"] + 1
            or any(part[name] != before[name] for name in same)
        ):
            raise Refused(UNEXPECTED, "not the part that was to come")
        if part["part"]:
            entries = before["topology"] + entries
        if len(entries) > TOPOLOGY_MAX or more and not part["topology"]:
            raise Refused(UNEXPECTED, "a topology has 1 to 2048 entries, and no empty part before its last")
        if more:
            self.parts = {**part, "topology": entries}

    def answer(self, channel, msg_type, request):
        """The answer to one request: type and message."""
        if channel == 1 and msg_type == 0x0101:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024
            return 0x0102, {
                "probe": request["probe"],
                "health": 1,
                "workload": 0,
                "cpu_count": os.cpu_count() or 1,
                "cpu_busy_permille": 0,
                "pressure_cpu": 0xFFFF,
                "pressure_memory": 0xFFFF,
                "pressure_io": 0xFFFF,
                "memory_total_kib": memory,
                "memory_available_kib": memory // 2,
                "io_read_bytes": 0,
                "io_write_bytes": 0,
            }
        if channel == 2 and msg_type in (0x0201, 0x0202, 0x0203):
            if "fence" in request and request["fence"]["generation"] != request["failed_generation"]:
                raise Refused(NOT_FENCED, "the certificate is for another generation")
            if msg_type == 0x0202 and request["instance"] == self.name:
                raise Refused(NOT_FENCED, "that is this instance, and it runs")
            if msg_type == 0x0203:
                self.collect(request)
            return msg_type | REPLY, {"recovery": request["recovery"], "elapsed_ms": 0}
        raise Refused(UNEXPECTED, f"{layout(msg_type)[0]} is not answered on this channel")

    def serve(self, stream):
        def take(count):
            data = b""
            while len(data) < count:
                more = stream.recv(count - len(data))
                if not more:
                    raise EOFError
                data += more
                # The first byte may take for ever, a frame may not.
                if until[0] is None:
                    until[0] = time.monotonic() + FRAME_TIMEOUT_S
                stream.settimeout(max(until[0] - time.monotonic(), 0.001))
            return data

        def frame():
            """Between frames nothing is waited for, unless HELLO is still to come."""
            if greeted:
                until[0] = None
                stream.settimeout(None)
            return read_frame(take)

        def send(msg_type, sequence, message):
            stream.sendall(write_frame(msg_type, sequence, message))

        def refuse(refused):
            """Says why; whether the connection ends."""
            error = {"code": refused.code, "text": str(refused)}
            error |= {"offending_type": refused.msg_type, "offending_sequence": refused.sequence}
            send(0x0F01, refused.sequence, error)
            return refused.code in ENDING

        until, greeted, pending = [time.monotonic() + HELLO_TIMEOUT_S], False, None
        try:
            stream.settimeout(HELLO_TIMEOUT_S)
            line = b""
            while not line.endswith(b"\n") and len(line) < 32:
                line += take(1)
            if line != f"CONNECT {PORT}\n".encode():
                return
            stream.sendall(f"OK {PORT}\n".encode())
            while True:
                msg_type, sequence, _, request = frame()
                if msg_type in (0x0102, 0x0F01, 0x0F02) or msg_type & REPLY:
                    if msg_type == 0x0F01 and request["code"] in ENDING:
                        return
                    continue
                try:
                    if not greeted and msg_type != (0x0002 if pending else 0x0001):
                        raise Refused(UNEXPECTED, "HELLO comes first, then AUTHENTICATE")
                    if greeted:
                        send_type, message = self.answer(greeted["channel"], msg_type, request)
                        send(send_type, sequence, message)
                        continue
                    if pending:
                        self.authenticate(*pending, request)
                        greeted = pending[0]
                        send(0x0002 | REPLY, sequence, {"incarnation": self.incarnation})
                    else:
                        self.welcome(request)
                        reply = self.identity(request)
                        send(0x0001 | REPLY, sequence, reply)
                        if self.key:
                            pending = (request, reply)
                            continue
                        greeted = request
                    if greeted["channel"] == 2:
                        status = {"health": 1, "workload": 0, "flags": 0}
                        send(0x0103, 1, {**status, "exit_status": 0, "restarts": 0})
                except Refused as refused:
                    refused.msg_type, refused.sequence = msg_type, sequence
                    if refuse(refused):
                        return
        except Refused as refused:
            # A frame that breaks the framing: one ERROR, then the end.
            refuse(refused)
        except (EOFError, OSError):
            pass
        finally:
            stream.close()


def serve(path, name, generation, key=""):
    instance = Instance(name, int(generation), bytes.fromhex(key))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        # Whoever started this ends it by closing its standard input.
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        while True:
            stream, _ = listener.accept()
            threading.Thread(target=instance.serve, args=(stream,), daemon=True).start()


def golden(folder):
    count = 0
    for path in sorted(pathlib.Path(folder).glob("*.hex")):
        lines = path.read_text().splitlines()
        frame = bytes.fromhex(" ".join(line.split("#")[0] for line in lines))
        rest = [frame]

        def read(length):
            taken, rest[0] = rest[0][:length], rest[0][length:]
            return taken

        msg_type, sequence, timestamp, message = read_frame(read)
        assert not rest[0], f"{path.name}: bytes after its end"
        again = write_frame(msg_type, sequence, message, timestamp)
        assert again == frame, f"{path.name}: written otherwise"
        for bit in range(len(frame) * 8):
            flipped = bytearray(frame)
            flipped[bit // 8] ^= 1 << bit % 8
            rest[0] = bytes(flipped) + bytes(1 << 20) if bit // 8 in range(12, 16) else bytes(flipped)
            try:
                read_frame(read)
            except Refused:
                continue
            raise AssertionError(f"{path.name}: bit {bit} does not count")
        reply = " reply" if msg_type & REPLY else ""
        print(f"{path.stem}: {layout(msg_type)[0]}{reply} {sequence}")
        count += 1
    assert count, f"no golden frames in {folder}"


if __name__ == "__main__":
    {"golden": golden, "serve": serve}[sys.argv[1]](*sys.argv[2:])
