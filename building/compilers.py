"""Running compilers, and finding the one for C++."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CANDIDATES = ("c++", "g++", "clang++")
LAUNCHERS = {"ccache", "sccache", "distcc"}
PROBE = """
#include <type_traits>
#if defined(__clang__) ? __clang_major__ < 12 && !defined(__apple_build_version__) : __GNUC__ < 10
#error expected GCC 10, Clang 12 or newer
#endif
static_assert(std::is_same_v<int, int>);
"""


class NotBuilt(Exception):
    """Native code cannot be built; the message says why, in a line."""


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def run(command: Iterable[object], stdin: str = "", **environment: str) -> tuple[bool, str]:
    """Run a compiler. Returns whether it succeeded, and what it printed."""
    try:
        result = subprocess.run(
            [str(word) for word in command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", **environment},  # first_error() reads English
        )
    except OSError as error:  # it does not exist, or may not be executed
        return False, str(error.strerror)
    ended = f"\nerror: it was ended by signal {-result.returncode}" if result.returncode < 0 else ""
    return result.returncode == 0, result.stdout + ended


def first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = re.compile(r"\b(error|fatal)\b(?!\.)[^:/]*:|undefined reference|cannot find", re.IGNORECASE)
    return next(filter(telling.search, lines), lines[-1] if lines else "it failed and printed nothing")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, which may begin with a launcher as ccache and end with flags."""

    command: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.command[self._launchers()]

    @property
    def flags(self) -> tuple[str, ...]:
        return self.command[self._launchers() + 1 :]

    def _launchers(self) -> int:
        return 1 if Path(self.command[0]).name in LAUNCHERS and len(self.command) > 1 else 0


def why_not(compiler: Compiler) -> str | None:
    """Why it cannot build a library of C++17; None if it can."""
    missing = [word for word in (compiler.command[0], compiler.program) if shutil.which(word) is None]
    if missing:
        return f"there is no program {missing[0]}"
    with tempfile.TemporaryDirectory() as folder:
        flags = ("-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", f"{folder}/probe.so")
        works, output = run([*compiler.command, *flags], PROBE)
    return None if works else first_error(output)


def find_compiler() -> Compiler:
    """The compiler that CXX names, or else the first that works."""
    if sys.platform == "win32":
        raise NotBuilt("the native code needs GCC or Clang, and is not built on Windows")
    if os.environ.get("CXX"):
        named = os.environ["CXX"]  # a path with spaces, or several words
        compiler = Compiler((named,) if shutil.which(named) else tuple(shlex.split(named)))
        reason = why_not(compiler)
        if reason is not None:
            raise SystemExit(f"error: CXX={named}: {reason}")
        return compiler
    reasons = {name: why_not(Compiler((name,))) for name in CANDIDATES}
    for name, reason in reasons.items():
        if reason is None:
            return Compiler((name,))
    broken = [f"{name}: {reason}" for name, reason in reasons.items() if shutil.which(name) is not None]
    raise NotBuilt(f"there is no C++ compiler that works: {broken[0] if broken else 'no ' + ', '.join(CANDIDATES)}")
