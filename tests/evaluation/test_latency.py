"""How long answers take: one number for every nested size."""

import pytest
import torch

import treeify
from treeify.evaluation.latency import answer_seconds
from treeify.models.architecture import Architecture


def test_every_nested_size_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.zeros(1, 3, 8, 8)
    base = Architecture("small:build", {"classes": 10})
    hne = treeify.hierarchicalize(base, ["stage1", "stage2:3"], example_input=example).eval()
    sizes = []
    predict = treeify.HierarchicalEnsemble.predict

    def counting(self: treeify.HierarchicalEnsemble, x: torch.Tensor, leaves: int) -> object:
        sizes.append(leaves)
        return predict(self, x, leaves)

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "predict", counting)
    seconds = answer_seconds(hne, example, budget=0.0)
    assert list(seconds) == [1, 3, 6]
    assert all(time > 0 for time in seconds.values())
    # Once to warm up, and the three rounds that are measured whatever they take.
    assert sizes == [1, 3, 6] * 4
