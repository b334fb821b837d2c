"""One leaf as a plain repository of timm: no treeify is needed to load it."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data.preparation import Preparation
from treeify.errors import InputError, ModelError
from treeify.models.architecture import Architecture
from treeify.models.builders import TIMM, TORCHVISION
from treeify.models.saved_architecture import without_weights
from treeify.share.markdown import literal, plain

# What timm notes of the weights that it would download, and of these is not true.
_OF_OTHER_WEIGHTS = (
    *("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description"),
    *("label_names", "label_descriptions", "label_offset", "test_input_size", "test_crop_pct"),
)


def timm_architecture(hne: HierarchicalEnsemble) -> Architecture:
    """What timm builds a leaf from.

    Raises:
        InputError: the base model is none of timm's.
    """
    architecture = hne.architecture
    name = "" if architecture is None else architecture.name
    if architecture is None or ":" in name or name.startswith(TORCHVISION):
        raise InputError(
            "a leaf of this ensemble is no model of timm's.",
            expected="an ensemble of one, such as resnet18",
            found=name or "a module of the user's own",
            next_step="Push the ensemble itself: leave --as-timm (as_timm) out.",
        )
    clean = without_weights(architecture)
    return Architecture(name.removeprefix(TIMM), clean.kwargs)


def write_leaf(
    hne: HierarchicalEnsemble,
    leaf: int,
    folder: Path,
    repository: str,
    licence: str | None,
    base_model: str | None,
) -> None:
    """Write what timm itself writes of a model, and compare what it reads back.

    Args:
        hne: the ensemble.
        leaf: which one.
        folder: exists.
        repository: `org/name`, for the card.
        licence: identifier, for the card.
        base_model: the hub's name of the weights that it began with, likewise.

    Raises:
        InputError: the base model is none of timm's.
        LeafError: there is no such leaf.
        ModelError: timm builds another model from it.
        OSError: it cannot be written.
    """
    architecture = timm_architecture(hne)
    model: Any = hne.leaf(leaf).eval()
    preparation = hne.preparation
    kept = {k: v for k, v in model.pretrained_cfg.items() if k not in _OF_OTHER_WEIGHTS}
    model.pretrained_cfg = {**kept, **_images(hne.example, preparation)}
    classes = None if preparation is None else preparation.classes
    arguments = {k: v for k, v in architecture.kwargs.items() if k != "num_classes"}
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={} if classes is None else {"label_names": list(classes)},
        model_args=arguments,
        safe_serialization=True,
    )
    (folder / "README.md").write_text(
        _card(architecture, leaf, repository, licence, base_model, preparation), encoding="utf-8"
    )
    _compare(model, folder, hne.example_images(2))


def _images(shape: tuple[int, ...], preparation: Preparation | None) -> dict[str, Any]:
    """What timm notes of images, as far as it is known."""
    if preparation is None or not preparation.is_known:
        return {"input_size": shape}
    return {
        "input_size": preparation.shape,
        "mean": preparation.mean,
        "std": preparation.std,
        "crop_pct": preparation.crop_pct,
        "crop_mode": preparation.crop_mode,
        "interpolation": preparation.interpolation,
    }


@torch.no_grad()
def _compare(model: nn.Module, folder: Path, images: torch.Tensor) -> None:
    images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if not torch.equal(again.to(images.dtype)(images), model(images)):
        raise ModelError(
            "timm reads another model than the leaf that was written.",
            expected="the same logits",
            next_step="Push the ensemble itself, and report this: it is a bug.",
        )


def _card(
    architecture: Architecture,
    leaf: int,
    repository: str,
    licence: str | None,
    base_model: str | None,
    preparation: Preparation | None,
) -> str:
    from huggingface_hub import ModelCardData

    tags = ["image-classification", "timm", "treeify"]
    data = ModelCardData(library_name="timm", license=licence, base_model=base_model, tags=tags)
    name = repository.partition("/")[2]
    images = "How images were prepared in training is not known."
    if preparation is not None and preparation.is_known:
        images = f"Images: {plain(preparation, 500)}."
    terms = "nobody said it" if licence is None else plain(licence)
    if base_model is not None:
        terms += f"; it began with the weights of {literal(base_model)}, which have theirs"
    return f"""---
{data.to_yaml()}
---

# {plain(name)}

Leaf {leaf} of a hierarchical neural ensemble of treeify's, by itself: timm's plain
{literal(architecture)}.

```python
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
```

{images} Licence: {terms}. Its accuracy by itself is not stated here.
"""
