"""The tool that writes the page on coverage."""

import runpy
from pathlib import Path

import sweep_models
import torch
from rows import row

from treeify.evaluation.cost import fvcore_macs

TOOL = Path(__file__).parents[2] / "benchmarks" / "coverage.py"


def test_macs_are_counted_again_from_where_that_was_interrupted(tmp_path: Path) -> None:
    names = ("resnet18", "sweep_models:tiny", "sweep_models:raising")
    rows = [row(name, macs=1, packed_fraction=0.5) for name in names]
    file = tmp_path / "macs.csv"
    file.write_text("resnet18,7\n", encoding="utf-8")
    recounted = list(runpy.run_path(str(TOOL))["recounted"](rows, file))
    tiny = fvcore_macs(sweep_models.tiny(), torch.zeros(1, 3, 224, 224))
    assert [own.macs for own in recounted] == [7, tiny, 1]
    assert file.read_text(encoding="utf-8").split() == ["resnet18,7", f"sweep_models:tiny,{tiny}"]
    changed = {"macs"}
    for before, after in zip(rows, recounted, strict=True):
        assert before.model_dump(exclude=changed) == after.model_dump(exclude=changed)
