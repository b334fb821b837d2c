"""The allocator keeps large blocks when asked to, and only then."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt"
)

# 64 MB are 16,384 pages of 4 KB.
_ALLOCATE = """
import resource, sys
import torch, treeify
from treeify.allocator import tune_allocator

if sys.argv[1] == "tuned":
    assert tune_allocator() is True

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch():
    torch.ones(16 * 2**20)

for _ in range(6):  # until the heap has room beside what else was put there
    touch()
before = faults()
for _ in range(5):
    touch()
print(faults() - before)
"""


def _faults(mode: str) -> int:
    command = [sys.executable, "-c", _ALLOCATE, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


def test_a_tuned_allocator_keeps_memory_and_importing_does_not_tune() -> None:
    plain, tuned = _faults("plain"), _faults("tuned")
    assert plain > 5 * 100  # huge pages of 2 MB fault 32 times for 64 MB
    assert tuned < plain / 10
