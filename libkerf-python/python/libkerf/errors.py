"""What libkerf raises: one exception for each error type of the Rust library.

``kind``, where there is one, names the case in lower case: it is for programs, the message for people.
"""

from __future__ import annotations

# Not imported at run time: the extension module raises these, and imports them when it does.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from libkerf._libkerf import Report


class KerfError(Exception):
    """Anything that libkerf raises of its own."""


class TreeError(KerfError, ValueError):
    """Something is not a device tree, or cannot be written as one."""


class BlobError(TreeError):
    """Bytes are no device tree blob."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset
        """Where in the blob, in bytes."""


class SourceError(TreeError):
    """A text is not device tree source."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line = line
        """The line, from 1."""
        self.column = column
        """The byte in the line, from 1."""


class KerfTextError(TreeError):
    """A text in the form of kerf 0.1 is one that kerf 0.1 did not read."""


class UnprintableError(TreeError):
    """Source text cannot write a name; a blob can."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path
        """The node that has it."""


class ValidationError(KerfError, ValueError):
    """A tree, an instance or an overlay breaks rules. ``report`` has all that is wrong."""

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        return str(self.report).rstrip()


class UnsplittableError(KerfError, ValueError):
    """One operation of an overlay is larger than the kernel takes."""


class _KindError(KerfError):
    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class ShortageError(_KindError):
    """There are no such resources for a new instance.

    ``kind`` is senseless, name-taken, id-taken, cpus, cores, memory or node.
    """


class ExchangeError(_KindError):
    """There is no such exchange. ``kind`` is unknown, itself, memory or unplaced."""


class ChangeError(_KindError):
    """There is no overlay for a change. ``kind`` is fixed, device, regions, unplaced or memory."""


class KernelError(KerfError):
    """Something could not be had of the kernel's files."""

    def __init__(self, message: str, path: str | None = None, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        """The file."""
        self.errno = errno
        """The system's number for what happened, if it was the system that refused."""


class NoPoolError(KernelError):
    """The kernel has no pool yet."""


class LateError(KernelError, TimeoutError):
    """An instance did not come into a state in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class LockError(_KindError):
    """The lock could not be taken. ``kind`` is held, kerf or io."""

    def __init__(self, message: str, kind: str = "", path: str = "") -> None:
        super().__init__(message, kind)
        self.path = path
        """The lock's file."""


class ApplyError(_KindError):
    """An overlay is not in place, or not as planned.

    ``kind`` is lost, rolled-back, stuck, not-as-planned, parts-undone or parts-in-place.
    """

    def __init__(self, message: str, kind: str = "", transactions: list[int] | None = None) -> None:
        super().__init__(message, kind)
        self.transactions = transactions or []
        """The transactions that are still there."""


class BootError(_KindError):
    """A kernel is not loaded, booted or halted. ``kind`` is state, id, ended, command-line or refused."""

    def __init__(self, message: str, kind: str = "", errno: int | None = None) -> None:
        super().__init__(message, kind)
        self.errno = errno
        """The system's number for what happened, if the kernel refused."""


class LoadError(_KindError):
    """A file is not loaded, or not recorded.

    ``kind`` is file, packed, memory, unrecorded or still-recorded.
    """


class RecordError(_KindError):
    """A record or a definition cannot be used.

    ``kind`` is name, io, content, source or unprintable.
    """

    def __init__(self, message: str, kind: str = "", path: str | None = None) -> None:
        super().__init__(message, kind)
        self.path = path
        """The file."""


class InstanceNotFoundError(KerfError, LookupError):
    """No instance of this name is saved, and the kernel has none."""


class DaemonError(KerfError):
    """kmorphd refused, or what it was asked for failed."""

    def __init__(self, message: str, code: str = "", next_step: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        """The kind, as the control API names it: ``not_found``, ``already_exists``, …"""
        self.next_step = next_step
        """What to do next, when there is something."""


class UnreachableError(DaemonError, ConnectionError):
    """kmorphd cannot be reached, or ended the connection."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class SilentError(DaemonError, TimeoutError):
    """kmorphd did not do in time what it was asked for; it may still be at it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
