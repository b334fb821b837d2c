"""Programs for ExecuTorch answer as the ensemble; without the package a message says so."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from treeify.deploy import executorch_program
from treeify.deploy.executorch_program import DESCRIPTION, export_executorch
from treeify.errors import ExportError

installed = pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is an extra")


@installed
@pytest.mark.filterwarnings("ignore")  # of executorch, about itself
def test_methods_answer_as_the_ensemble(tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    hne = small.ensemble()
    written = export_executorch(hne, tmp_path / "net.pte", sizes=[1, 3], batch=2)
    program = Runtime.get().load_program(written.path)
    (text,) = program.load_method(DESCRIPTION).execute([])
    methods = json.loads(text)
    assert [method["leaves"] for method in methods] == [1, 3]
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values: dict[str, Any] = {"images": x}
    leaves = []
    for method in methods:
        arguments = [values[name] for name in method["inputs"]]
        results = program.load_method(method["name"]).execute(arguments)
        values |= zip(method["outputs"], (each.clone() for each in results), strict=True)
        leaves.append(values["logits"])
        mean = torch.cat(leaves, 1).mean(1)
        torch.testing.assert_close(
            mean, hne.predict(x, leaves=method["leaves"]).detach(), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ExportError, match="there already"):
        export_executorch(hne, written.path)


def test_without_executorch_a_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_program, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"treeify\[executorch\]"):
        export_executorch(small.ensemble(), tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())
