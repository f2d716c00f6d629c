"""Frames of KMP, for python_peer.py: read, checked and written, from docs/kmp.md alone."""

import struct
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


def provider():
    read, write, size = fixed(
        "memory_bytes:Q dirty_bytes_per_s:Q provider:I state_kinds:I modes:I state_version:I"
    )

    def read_all(data):
        return {**read(data), "why_not": text(TEXT_MAX)[0](data[size:])}

    def write_all(value):
        return write(value) + value["why_not"].encode()

    return read_all, write_all


KINDS = {
    1: ("instance", text(63)),
    2: ("kernel_release", text(SHORT_MAX, SHORT_MAX)),
    3: ("agent_version", text(SHORT_MAX, SHORT_MAX)),
    4: ("text", text(TEXT_MAX)),
    5: ("fence", exactly("method:H confirmation:H flags:I generation:Q fenced_at_unix_ns:Q -:8s")),
    6: ("topology", topology()),
    7: ("provider", provider()),
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
TRANSFER = (
    "session:Q offset:Q total_bytes:Q dirty_bytes:Q round:I flags:I chunk_crc32:I op:H/1-4"
    " mode:H/1-2 provider:I -:4s",
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
    0x0302: (
        "MORPH_NEGOTIATE",
        8192,
        ("session:Q providers:I -:4s", {}),
        ("session:Q -:8s", {7: (0, 12, CRITICAL)}),
    ),
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
