"""One leaf as timm writes it: timm reads it, with the same logits, and without treeify."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard

import treeify
from treeify.data import Preparation
from treeify.errors import InputError

MODELS = {
    "test_resnet": {},
    "test_vit": {"num_classes": 5, "in_chans": 1},
    "test_efficientnet": {"num_classes": 7},
}


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = timm.create_model(request.param, **MODELS[request.param])
    shape = model.pretrained_cfg["input_size"][1:]
    x = torch.zeros(1, MODELS[request.param].get("in_chans", 3), *shape)
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(model, 1, init="fresh", example_input=x)
    classes = tuple(f"class {number}" for number in range(hne(x).shape[-1]))
    hne.preparation = Preparation(
        size=shape, mean=(0.1,), std=(0.2,), channels=x.shape[1], crop_pct=0.8, classes=classes
    )
    treeify.save(hne, tmp_path / "ensemble")
    return tmp_path / "ensemble"


@pytest.mark.parametrize("leaf", [0, 1])
def test_timm_reads_the_leaf(leaf: int, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pushed = treeify.push(
        saved,
        "org/leaf",
        as_timm=leaf,
        dry_run=True,
        out=out,
        licence="apache-2.0",
        base_model="timm/test_resnet.r160_in1k",
    )
    assert sorted(map(str, pushed.files)) == ["README.md", "config.json", "model.safetensors"]
    hne = treeify.load(saved)
    x = torch.rand(2, *hne.example)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert torch.equal(model(x), hne.leaf(leaf).eval()(x))
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == hne(x).shape[-1]
    assert config["label_names"] == list(hne.preparation.classes)
    data = timm.data.resolve_data_config(model=model)
    channels = hne.example[0]
    assert tuple(data["mean"]) == (0.1,) * channels
    assert tuple(data["std"]) == (0.2,) * channels
    assert data["crop_pct"] == 0.8
    # Nothing that timm notes of other weights.
    assert not {"tag", "license", "hf_hub_id", "url"} & config["pretrained_cfg"].keys()
    card = ModelCard.load(out / "README.md").data
    assert (card.library_name, card.license) == ("timm", "apache-2.0")
    assert card.base_model == "timm/test_resnet.r160_in1k"
    assert "the weights of `timm/test_resnet.r160_in1k`" in (out / "README.md").read_text()


@pytest.mark.usefixtures("logged_in")
def test_it_is_pushed_and_read_without_treeify(
    converted: Path, hub: fake_hub.Hub, tmp_path: Path
) -> None:
    treeify.push(converted, "org/leaf", as_timm=1)
    x = torch.ones(1, 3, 32, 32)
    expected = treeify.load(converted).leaf(1).eval()(x).sum().item()
    code = (
        "import sys, timm, torch\n"
        "model = timm.create_model('hf-hub:org/leaf', pretrained=True).eval()\n"
        "print(model(torch.ones(1, 3, 32, 32)).sum().item(), 'treeify' in sys.modules)"
    )
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    total, has_treeify = done.stdout.split()
    assert float(total) == pytest.approx(expected, abs=1e-4)
    assert has_treeify == "False"


def test_others_than_timms_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model of timm's[\s\S]*treeify.models"):
        treeify.push(trained, "org/leaf", as_timm=0, dry_run=True, out=tmp_path / "out")
    x = torch.zeros(1, 3, 32, 32)
    hne = treeify.hierarchicalize("torchvision/resnet18", ["layer4"], init="fresh", example_input=x)
    treeify.save(hne, tmp_path / "other")
    with pytest.raises(InputError, match="no model of timm's"):
        treeify.push(tmp_path / "other", "org/leaf", as_timm=0, dry_run=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_images_are_said(converted: Path, tmp_path: Path) -> None:
    hne = treeify.load(converted)
    assert hne.preparation is not None
    hne.preparation = replace(hne.preparation, mean=None, std=None)
    treeify.save(hne, tmp_path / "mine")
    treeify.push(tmp_path / "mine", "org/leaf", as_timm=0, dry_run=True, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "How images were prepared in training is not known." in card
