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
from treeify.engine.allocator import tune_allocator

if sys.argv[1] == "tuned":
    assert tune_allocator() is True

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch():
    torch.ones(16 * 2**20)

# The heap takes some rounds until it has room beside what else was put there, so the least counts.
rounds = []
for _ in range(20):
    before = faults()
    touch()
    rounds.append(faults() - before)
print(min(rounds))
"""


def _faults(mode: str) -> int:
    command = [sys.executable, "-c", _ALLOCATE, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


def test_a_tuned_allocator_keeps_memory_and_importing_does_not_tune() -> None:
    plain, tuned = _faults("plain"), _faults("tuned")
    assert plain >= 32  # one for every huge page of 2 MB, or many more
    assert tuned < plain / 10
