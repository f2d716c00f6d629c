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
import struct
import sys
import threading
import time
import zlib

MAGIC, VERSION, REPLY, PORT = 0x4B4D5000, 1, 0x8000, 9000
HEADER = struct.Struct("<IHHIIQII")
CRITICAL, TEXT_MAX, SHORT_MAX, NAME_MAX = 1, 512, 128, 64
TOPOLOGY_MAX, MORE = 2048, 1
HELLO_TIMEOUT_S, FRAME_TIMEOUT_S = 2, 10
MALFORMED, BAD_CRC, BAD_VERSION, UNKNOWN_TYPE, UNEXPECTED, TOO_LARGE, STALE = range(1, 8)
NOT_FENCED, WRONG_PEER, NOT_AUTHENTIC, OLDER_DAEMON = 14, 16, 17, 18
# Codes after which a connection ends, whatever its channel.
ENDING = {MALFORMED, BAD_CRC, BAD_VERSION, UNKNOWN_TYPE, TOO_LARGE, STALE, WRONG_PEER}
ENDING |= {NOT_AUTHENTIC, OLDER_DAEMON}


class Refused(Exception):
    """What is answered with ERROR: its code, its text, and which frame it is about."""

    def __init__(self, code, text, msg_type=0, sequence=0):
        super().__init__(text)
        self.code, self.msg_type, self.sequence = code, msg_type, sequence


def need(condition, text):
    if not condition:
        raise Refused(MALFORMED, text)


# --- Records: how the bytes of each kind become a value, and back. ---


def text(limit, write=TEXT_MAX):
    def read(data):
        need(len(data) <= limit, "a text is too long")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise Refused(MALFORMED, "a text is not UTF-8") from None

    return read, lambda value: value.encode()[:write].decode(errors="ignore").encode()


def fixed(fields):
    """A structure with its reserved bytes: `name format`, space-separated; `-` is reserved."""
    names, formats, enums = [], "<", []
    for field in fields.split():
        name, form = field.split(":")
        if "/" in form:
            form, allowed = form.split("/")
            enums.append((name, range(int(allowed.split("-")[0]), int(allowed.split("-")[1]) + 1)))
        names.append(name)
        formats += form
    layout = struct.Struct(formats)

    def read(data):
        need(len(data) >= layout.size, "the payload is too short")
        value = dict(zip(names, layout.unpack_from(data)))
        reserved = value.pop("-", b"")
        need(not any(reserved), "reserved bytes are not zero")
        for name, allowed in enums:
            need(value[name] in allowed, f"{value[name]} is no {name}")
        return value

    def write(value):
        empty = {"-": b""}
        return layout.pack(*({**empty, **value}[name] for name in names))

    return read, write, layout.size


def exactly(fields):
    read, write, size = fixed(fields)

    def read_all(data):
        need(len(data) == size, "a record has another length")
        return read(data)

    return read_all, write


def octets(size):
    def read(data):
        need(len(data) == size, "a record has another length")
        return bytes(data)

    return read, bytes


def topology():
    read, write, size = fixed("generation:Q memory_kib:Q cid:Q cpu_count:H name_len:H -:4s")

    def read_all(data):
        head = read(data)
        cpus, name = head.pop("cpu_count"), head.pop("name_len")
        need(cpus <= 1024 and name <= 63, "too many CPUs, or too long a name")
        need(len(data) == size + 2 * cpus + name, "lengths contradict each other")
        head["cpus"] = list(struct.unpack_from(f"<{cpus}H", data, size))
        head["name"] = text(63)[0](data[size + 2 * cpus :])
        return head

    def write_all(value):
        cpus, name = value["cpus"], value["name"].encode()
        head = {**value, "cpu_count": len(cpus), "name_len": len(name)}
        return write(head) + struct.pack(f"<{len(cpus)}H", *cpus) + name

    return read_all, write_all


def check():
    read, write, size = fixed("duration_us:I name_len:H result:B/1-2 -:1s")

    def read_all(data):
        head = read(data)
        end = size + head.pop("name_len")
        need(end <= len(data), "lengths contradict each other")
        head["name"] = text(NAME_MAX)[0](data[size:end])
        head["detail"] = text(TEXT_MAX)[0](data[end:])
        return head

    def write_all(value):
        name = value["name"].encode()
        return write({**value, "name_len": len(name)}) + name + value["detail"].encode()

    return read_all, write_all


KINDS = {
    1: ("instance", text(63)),
    2: ("kernel_release", text(SHORT_MAX, SHORT_MAX)),
    3: ("agent_version", text(SHORT_MAX, SHORT_MAX)),
    4: ("text", text(TEXT_MAX)),
    5: ("fence", exactly("method:H confirmation:H flags:I generation:Q fenced_at_unix_ns:Q -:8s")),
    6: ("topology", topology()),
    7: ("missing", text(TEXT_MAX)),
    8: ("data", (bytes, bytes)),
    9: ("reference", exactly("region:Q length:Q digest:Q")),
    10: ("check", check()),
    11: ("range", exactly("start:Q length:Q")),
    12: ("pci_port", text(32)),
    13: ("window", exactly("start:Q length:Q offset:Q")),
    14: ("nonce", octets(32)),
    15: ("proof", octets(32)),
}

# --- Messages: type, name, limit, fixed part, records as kind: (least, most, critical). ---

MAYBE, MUST = (0, 1, 0), (1, 1, CRITICAL)
RECOVER = "recovery:Q failed_generation:Q cause:H -:6s"
RECOVER_REPLY = ("recovery:Q elapsed_ms:I -:4s", {})
HELLO = (
    "version_min:H version_max:H role:B/1-2 channel:B/1-3 flags:H generation:Q boot_id:16s"
    " features:Q session:Q incarnation:Q",
    {1: MUST, 2: MAYBE, 3: MAYBE, 14: (0, 1, CRITICAL), 15: (0, 1, CRITICAL)},
)
VMCORE = ("capture:Q bytes:Q status:H/0-1 -:6s", {})
NEGOTIATE = (
    "session:Q memory_bytes:Q dirty_bytes_per_s:Q state_kinds:I providers:I modes:I"
    " state_version:I verdict:B/0-2 -:7s",
    {7: (0, 12, 0)},
)
TRANSFER = (
    "session:Q offset:Q total_bytes:Q dirty_bytes:Q round:I flags:I chunk_crc32:I op:H/1-4"
    " mode:H/1-2 -:8s",
    {8: (0, 1, CRITICAL), 9: (0, 1024, CRITICAL)},
)
MESSAGES = {
    0x0001: ("HELLO", 1024, HELLO, HELLO),
    0x0002: ("AUTHENTICATE", 128, ("proof:32s", {}), ("incarnation:Q", {})),
    0x0101: ("HEARTBEAT_REQ", 128, ("probe:I flags:I self_lag_us:I -:4s", {}), None),
    0x0102: (
        "HEARTBEAT_RSP",
        223,
        (
            "probe:I health:B workload:B cpu_count:H cpu_busy_permille:H pressure_cpu:H"
            " pressure_memory:H pressure_io:H memory_total_kib:Q memory_available_kib:Q"
            " io_read_bytes:Q io_write_bytes:Q",
            {},
        ),
        None,
    ),
    0x0103: (
        "HEALTH_STATUS",
        1024,
        ("health:B workload:B flags:H exit_status:i restarts:I -:4s", {4: MAYBE}),
        None,
    ),
    0x0201: ("RECOVER_PREPARE", 4096, (RECOVER, {1: MUST, 4: MAYBE}), RECOVER_REPLY),
    0x0202: ("RECOVER_RECLAIM", 4096, (RECOVER, {1: MUST, 5: MUST}), RECOVER_REPLY),
    0x0203: (
        "RECOVER_COMPLETE",
        262144,
        (
            "recovery:Q failed_generation:Q new_generation:Q outcome:H part:H flags:H -:2s",
            {1: MUST, 6: (0, 2048, 0)},
        ),
        RECOVER_REPLY,
    ),
    0x0211: (
        "VMCORE_START",
        65536,
        (
            "capture:Q generation:Q chunk_bytes:I -:4s",
            {12: (0, 1, CRITICAL), 13: (0, 16, CRITICAL), 11: (0, 1024, CRITICAL)},
        ),
        VMCORE,
    ),
    0x0212: (
        "VMCORE_DATA",
        1048576,
        (
            "capture:Q address:Q length:Q chunk_crc32:I encoding:H/0-1 -:2s",
            {8: (0, 1, CRITICAL)},
        ),
        None,
    ),
    0x0213: ("VMCORE_COMPLETE", 1024, VMCORE, VMCORE),
    0x0301: (
        "MORPH_PREPARE",
        1024,
        (
            "session:Q from_generation:Q to_generation:Q downtime_budget_us:I"
            " phase_timeout_ms:I side:B/1-2 -:7s",
            {},
        ),
        ("session:Q -:8s", {}),
    ),
    0x0302: ("MORPH_NEGOTIATE", 8192, NEGOTIATE, NEGOTIATE),
    0x0303: ("MORPH_TRANSFER_STATE", 1048576, TRANSFER, TRANSFER),
    0x0304: (
        "MORPH_VALIDATE",
        65536,
        ("session:Q round:I flags:I state_bytes:Q -:8s", {}),
        ("session:Q verdict:B/1-2 -:7s", {10: (0, 100, CRITICAL)}),
    ),
    0x0305: (
        "MORPH_COMMIT",
        1024,
        ("session:Q nonce:Q step:H/1-4 flags:H -:12s", {}),
        (
            "session:Q nonce:Q state_digest:Q elapsed_us:I step:H/1-4 status:H/1-2 -:8s",
            {},
        ),
    ),
    0x0306: (
        "MORPH_ROLLBACK",
        1024,
        ("session:Q side:B/1-2 -:7s", {4: MAYBE}),
        ("session:Q status:H/1-2 -:6s", {}),
    ),
    0x0F01: (
        "ERROR",
        1024,
        ("code:H offending_type:H offending_sequence:I -:8s", {4: MAYBE}),
        None,
    ),
    0x0F02: (
        "RETRY",
        256,
        (
            "retry_after_ms:I reason:H offending_type:H offending_sequence:I -:4s",
            {},
        ),
        None,
    ),
}


def layout(msg_type):
    """Name, limit, fixed part and records of a type, its reply bit included."""
    known = MESSAGES.get(msg_type & ~REPLY)
    payload = known and known[3 if msg_type & REPLY else 2]
    if not payload:
        raise Refused(UNKNOWN_TYPE, f"message type {msg_type:#06x} is unknown")
    return known[0], known[1], fixed(payload[0]), payload[1]


def read_payload(msg_type, payload):
    name, _, (read, _, size), records = layout(msg_type)
    message = read(payload)
    values = {kind: [] for kind in records}
    at = size
    while at < len(payload):
        need(at + 8 <= len(payload), "a record reaches beyond the payload")
        kind, flags, length = struct.unpack_from("<HHI", payload, at)
        end = at + 8 + length
        padded = end + -length % 8
        need(padded <= len(payload), "a record reaches beyond the payload")
        need(not any(payload[end:padded]), "padding is not zero")
        if kind in values:
            values[kind].append(KINDS[kind][1][0](payload[at + 8 : end]))
        else:
            need(not flags & CRITICAL, f"record kind {kind} is unknown and critical")
        at = padded
    for kind, (least, most, _) in records.items():
        found = values[kind]
        need(least <= len(found) <= most, f"record kind {kind} appears {len(found)} times")
        message[KINDS[kind][0]] = found if most > 1 else (found or [None])[0]
    if name == "HELLO":
        need((message["channel"] == 3) == (message["session"] != 0), "a session is a bulk channel's")
    if name == "MORPH_PREPARE" and not msg_type & REPLY:
        need(message["session"] != 0, "session 0")
        need(message["from_generation"] != message["to_generation"], "a morph to itself")
    if name == "MORPH_VALIDATE" and msg_type & REPLY and message["verdict"] == 1:
        need(all(one["result"] == 1 for one in message["check"]), "passed beside a failed check")
    return message


def write_frame(msg_type, sequence, message, timestamp=None):
    _, limit, (_, write, _), records = layout(msg_type)
    payload = write(message)
    for kind, (_, most, flags) in records.items():
        value = message.get(KINDS[kind][0])
        for one in value if most > 1 and value else [value] if value else []:
            data = KINDS[kind][1][1](one)
            payload += struct.pack("<HHI", kind, flags, len(data)) + data + bytes(-len(data) % 8)
    assert len(payload) <= limit
    if timestamp is None:
        timestamp = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    header = [MAGIC, VERSION, msg_type, sequence, len(payload), timestamp, 0, 0]
    header[6] = zlib.crc32(HEADER.pack(*header) + payload)
    return HEADER.pack(*header) + payload


def read_header(data):
    """Checks 2 to 6, in their order."""
    magic, version, msg_type, sequence, length, timestamp, crc, reserved = HEADER.unpack(data)
    need(magic == MAGIC, "the peer does not speak KMP")
    if version != VERSION:
        raise Refused(BAD_VERSION, f"protocol version {version}")
    need(reserved == 0, "the reserved header field is not 0")
    name, limit, _, _ = layout(msg_type)
    if length > limit:
        raise Refused(TOO_LARGE, f"a {name} payload of {length} bytes, the limit is {limit}")
    return msg_type, sequence, length, timestamp, crc


def read_frame(read):
    """The next frame from `read(count)`: type, sequence, timestamp, message."""
    head = read(HEADER.size)
    magic, version, msg_type, sequence, _, _, _, reserved = HEADER.unpack(head)
    readable = magic == MAGIC and version == VERSION and reserved == 0
    try:
        msg_type, sequence, length, timestamp, crc = read_header(head)
        payload = read(length)
        if zlib.crc32(head[:24] + bytes(4) + head[28:] + payload) != crc:
            raise Refused(BAD_CRC, "the checksum does not hold")
        return msg_type, sequence, timestamp, read_payload(msg_type, payload)
    except Refused as refused:
        if readable:
            refused.msg_type, refused.sequence = msg_type, sequence
        raise


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
