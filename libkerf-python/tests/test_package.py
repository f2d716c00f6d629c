"""The package as such."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import libkerf


def test_everything_is_documented() -> None:
    for name in libkerf.__all__:
        thing = getattr(libkerf, name)
        assert inspect.getdoc(thing), name
        if not name.endswith("Error"):
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                if not member.startswith("_"):
                    assert inspect.getdoc(value), f"{name}.{member}"


def test_every_error_is_a_kerf_error() -> None:
    errors = [name for name in libkerf.__all__ if name.endswith("Error")]
    assert len(errors) > 20
    for name in errors:
        assert issubclass(getattr(libkerf, name), libkerf.KerfError)


def test_it_is_one_wheel_with_types() -> None:
    files = importlib.metadata.files("libkerf") or []
    names = {Path(file).name for file in files}
    assert {"py.typed", "_libkerf.pyi", "_libkerf.abi3.so"} <= names
    assert importlib.metadata.version("libkerf").count(".") == 2


def test_importing_it_imports_little() -> None:
    code = "import sys; before = set(sys.modules); import libkerf; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
                         capture_output=True, text=True, check=True)
    modules = run.stdout.split()
    assert all(name.split(".")[0] in ("libkerf", "__future__") for name in modules), modules
