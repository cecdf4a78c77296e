"""Whether freed buffers are kept, seen from the page faults of a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

from moe_compress import allocator

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
PROGRAM = """
import resource
from moe_compress.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
default, kept = faults(), keep_freed_memory()
faults()
print(default, int(kept), faults())
"""


def _run(**settings: str) -> list[int]:
    environment = {name: value for name, value in os.environ.items() if name not in allocator._OF_THE_USER}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**environment, **settings}, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


@needs_glibc
def test_freed_buffers_are_kept_unless_the_environment_says_otherwise():
    default, kept, after = _run()
    if not kept and tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 36):
        pytest.skip("this glibc refuses")
    assert after < default / 8
    default, kept, after = _run(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept and after > default / 2


def test_a_system_without_it_is_left_alone(monkeypatch):
    for name in allocator._OF_THE_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
    allocator.give_back_freed_memory()  # does nothing


@needs_glibc
def test_freed_memory_between_other_is_given_back():
    program = """
import resource
from moe_compress.allocator import give_back_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

buffers = [bytearray(2**16) for _ in range(2048)]  # on the heap
del buffers[:-1]  # the last one keeps glibc from giving back the rest
before = resident()
give_back_freed_memory()
print(before - resident())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 2**26
