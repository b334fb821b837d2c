"""What a directory has to share: its ensemble, what is known of it, and the files beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import yaml

from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.saved_config import CONFIG, read_config, scored_ensemble, weights_in
from treeify.deploy.exported import looks_exported
from treeify.deploy.saved import checkpoint_in, preparation_in, recipe_of
from treeify.errors import InputError
from treeify.models.builders import TIMM
from treeify.report.reading import Options, read
from treeify.report.results import Result
from treeify.share.places import recipe_without_places, result_without_places
from treeify.training.recipe_file import values_of_run
from treeify.training.run_directory import METRICS


@dataclass(frozen=True)
class Contents:
    """An ensemble to share.

    Args:
        hne: the ensemble, as it was saved.
        path: of its checkpoint.
        result: what is known of it, without anything of the sharer's file system.
        recipe: of its run, likewise; None if no run wrote it.
        files: what is shared as it stands, by name.
    """

    hne: HierarchicalEnsemble
    path: Path
    result: Result
    recipe: dict[str, Any] | None
    files: dict[str, Path]

    @property
    def base_model(self) -> str | None:
        """The hub's name of the trained weights that a run began with, where its recipe tells."""
        model = self._model
        name = str(model.get("name", "")).removeprefix(TIMM)
        if not model.get("pretrained") or not timm.is_model(name):
            return None
        found = timm.get_pretrained_cfg(name)
        return None if found is None else found.hf_hub_id

    @property
    def is_from_scratch(self) -> bool:
        """Whether a run's recipe says that it began with random weights."""
        model = self._model
        return bool(model) and not model.get("pretrained") and model.get("weights") is None

    @property
    def _model(self) -> dict[str, Any]:
        model = (self.recipe or {}).get("model")
        return model if isinstance(model, dict) else {}


def load_ensemble(directory: Path, *, trust: bool = False) -> tuple[HierarchicalEnsemble, Path]:
    """The ensemble in a directory, which knows its images, and the path of its checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
        InputError: it is an export.
    """
    if looks_exported(directory):
        raise InputError(
            f"{directory} is an export, which goes with what it was exported from.",
            expected="a run, one of its checkpoints, or an ensemble",
            next_step="Push that, with its export beside it: treeify push DIR org/name"
            " --with export",
        )
    path = checkpoint_in(directory, trust=trust)
    hne = checkpoint.load(path, trust=trust)
    if hne.preparation is None and len(hne.example) == 3:  # an earlier version saved it
        hne.preparation = preparation_in(path, trust=trust)
    return hne, path


def read_contents(
    directory: Path, name: str, data: Sequence[str] = (), *, trust: bool = False
) -> Contents:
    """Read an ensemble, and measure it where its data can be had.

    Args:
        directory: a run, one of its checkpoints, or an ensemble by itself.
        name: of it in tables.
        data: keys of the data section to set, `key=value`.
        trust: as in `treeify.load`.

    Raises:
        CheckpointError: there is no ensemble, or it is damaged.
        DataError, RecipeError: the data that were asked for cannot be read.
        InputError: it is an export.
    """
    hne, path = load_ensemble(directory, trust=trust)
    file, recipe = recipe_of(path, trust=trust), None
    result = read(directory, name, Options(data, latency=False, trust=trust))
    shared = {CONFIG: path / CONFIG}
    weights, _ = weights_in(path, read_config(path, trust=trust))
    shared[weights.name] = weights
    if file is not None:
        recipe = recipe_without_places(values_of_run(file))
        if scored_ensemble(file.parent, trust=trust).resolve() == path.resolve():
            shared[METRICS] = file.parent / METRICS
        else:  # the last epoch's scores are another state's
            result = replace(result, epochs=(), rates=())
    shared = {key: value for key, value in shared.items() if value.is_file()}
    published = result_without_places(result, name, None if recipe is None else as_yaml(recipe))
    return Contents(hne, path, published, recipe, shared)


def as_yaml(recipe: dict[str, Any]) -> str:
    """The text of `recipe.yaml`."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
