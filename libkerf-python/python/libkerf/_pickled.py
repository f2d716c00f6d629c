"""What pickle and copy call to make an object again."""

from __future__ import annotations

from typing import Any

from libkerf._libkerf import _restore


def restore(kind: str, data: bytes) -> Any:
    """The object of the class ``kind`` that was made these bytes."""
    return _restore(kind, data)
