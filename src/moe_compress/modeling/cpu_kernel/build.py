"""Compiles `experts.cpp` for this CPU, once, and keeps the library in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from moe_compress.files import file_in_progress, user_cache

# OpenMP without its library: torch's own, which libtorch_cpu.so brings, so that both have the same threads.
_COMPILE: tuple[str, ...] = (
    "-c", "-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-trapping-math", "-fno-math-errno",
    "-fPIC", "-fopenmp", "-Wall",
)  # fmt: skip
_LINK = ("-shared", "-ltorch_cpu", "-lc10")
_SECONDS = 300

log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it is not wanted (`MOE_COMPRESS_CPU_KERNEL=0`) or cannot be had.

    What stands in the way of it is said once, as a warning, unless the system is not one that it is written for
    (Linux on x86-64 with AVX2) or has no compiler (`$CXX`, else g++).
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    wanted = os.environ.get("MOE_COMPRESS_CPU_KERNEL") != "0" and _written_for_this()
    if not wanted or shutil.which(compiler[0]) is None:
        return None
    try:
        found = ctypes.CDLL(str(_compiled(compiler)), mode=os.RTLD_NOW)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        log.warning(
            "The CPU kernel of compressed layers could not be built, PyTorch's operations stand in for it: %s. "
            "MOE_COMPRESS_CPU_KERNEL=0 leaves it out.",
            " ".join(reason.split())[:300],
        )
        return None
    found.sort_rows.restype = ctypes.c_int64
    found.multiplies.restype = ctypes.c_bool
    return found


def _written_for_this() -> bool:
    flags = torch.cpu.get_capabilities()
    on = sys.platform == "linux" and platform.machine() == "x86_64"
    return on and bool(flags.get("avx2") and flags.get("f16c") and flags.get("fma3"))


def _compiled(compiler: list[str]) -> Path:
    """The library, compiled if it is not in the cache; named by all that it depends on."""
    here, libraries = Path(__file__).parent, Path(torch.__file__).parent / "lib"
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [file.read_text() for pattern in ("*.cpp", "*.h") for file in sorted(here.glob(pattern))]
    parts += [version, torch.__version__, str(sorted(torch.cpu.get_capabilities().items()))]
    parts += [*compiler, *_COMPILE, *_LINK]
    directory = user_cache() / "cpu_kernel"
    target = directory / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, file_in_progress(target) as linked:
        compiled = str(Path(temporary) / "experts.o")
        for command in (
            [*compiler, *_COMPILE, str(here / "experts.cpp"), "-o", compiled],
            [*compiler, compiled, f"-L{libraries}", *_LINK, "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return target
