"""A model's architecture without its weights."""

import pytest
import small
import torch

from treeify.errors import ModelError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.rebuild import rebuild


def by_file(path: str) -> small.SmallNet:
    return small.SmallNet(torch.load(path)["classes"])


def downloading() -> small.SmallNet:
    model = small.SmallNet()
    model.load_state_dict(torch.hub.load_state_dict_from_url("http://localhost:1/no.pth"))
    return model


def test_a_builder_reads_its_file_only_where_the_architecture_depends_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    expected = fingerprint(small.SmallNet())
    monkeypatch.setattr(small, "by_file", by_file, raising=False)
    monkeypatch.setattr(small, "downloading", downloading, raising=False)
    torch.save({"classes": 5}, f"{tmp_path}/w")
    there = Architecture("small:by_file", {"path": f"{tmp_path}/w"})
    gone = Architecture("small:by_file", {"path": f"{tmp_path}/gone"})
    assert fingerprint(rebuild(there, expected)) == expected
    with pytest.raises(ModelError, match="gone"):
        rebuild(gone, expected)
    rebuild(gone, None)  # the best there is, where fingerprints say nothing
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torch.random.get_rng_state()
    assert fingerprint(rebuild(Architecture("small:downloading"), expected)) == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(torch.load(f"{tmp_path}/w"), dict)  # as it was
