"""What long tests of faults say about themselves."""

import pytest
from faults.fuzzing import SEED


@pytest.fixture
def show_seed(capfd: pytest.CaptureFixture[str]) -> None:
    """The seed, on the terminal whether the test passes or not."""
    with capfd.disabled():
        print(f"\nTREEIFY_FUZZ_SEED={SEED}")


@pytest.fixture(autouse=True)
def untuned_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
