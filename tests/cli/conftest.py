"""Commands under test leave the memory allocator of the test process alone."""

import pytest


@pytest.fixture(autouse=True)
def untuned_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEIFY_TUNE_ALLOCATOR", "0")
