"""Loading saved ensembles: weights as safetensors, everything else as JSON, never pickle.

    config.json         all but the weights, and which file has them
    model.safetensors   the weights; after they were saved over, model-IDENTITY.safetensors

Both tell when they are no longer what was written, see `treeify.checksums`.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from treeify import checksums
from treeify.conversion.assemble import assemble, blank_image
from treeify.conversion.ensemble import MEASUREMENTS, HierarchicalEnsemble, Measurements
from treeify.conversion.initialize import copies
from treeify.conversion.resolve import resolve
from treeify.data.preparation import PREPARATION, Preparation
from treeify.engine.packed_tensors import get_parent, get_tensor, named_tensors
from treeify.errors import CheckpointError, ModelError, TreeifyError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.rebuild import rebuild, without_weights
from treeify.models.recognise import recognise
from treeify.tracing.trace import plain_tensors
from treeify.versions import MODEL_LIBRARIES, versions_of

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Names that files of weights have.
WEIGHTS_NAME = re.compile(r"model(-[0-9a-f]{32})?\.safetensors")
# In a run's directory its newest ensemble, and in that one the average of its weights.
LAST, EMA = "last", "ema"
# Before the names of what no state dict has; no module's path has a space.
_BUFFER, _CONSTANT = "buffer ", "constant "


def load(
    path: str | Path, model: nn.Module | None = None, *, verify: bool = True
) -> HierarchicalEnsemble:
    """Read an ensemble that `treeify.save` wrote.

    Args:
        path: the directory.
        model: the base model, where treeify cannot build it by itself (an ensemble made from a
            module of the user's own). Its weights do not matter, and it is not modified.
        verify: whether both files must be, bit by bit, what was saved. Earlier versions did not
            write what tells it.

    Returns:
        The ensemble, in evaluation mode, on the CPU. Parameters that did not require gradients when
        it was saved do not now.

    Raises:
        CheckpointError: the directory is missing, damaged, of another format, or does not match its
            configuration.
    """
    path = Path(path)
    config, weights = _read(path, verify=verify)
    base, architecture = _built(path, config) if model is None else resolve(model)
    try:
        base = _with_constants(base, weights)
        hne = assemble(
            base,
            architecture or recognise(base),
            config["splits"],
            copies(base),
            example_input=blank_image(base, config["example"], config.get("batch", 1)),
            saved=True,
        )
    except TreeifyError as error:
        versions = (f"{package} {number}" for package, number in config["versions"].items())
        raise CheckpointError(
            f"{path}: its base model no longer converts as recorded: {error}",
            expected=f"the versions it was saved with: {', '.join(versions)}",
        ) from error
    _check_fingerprint(path, config, hne)
    _fill(path, hne, weights)
    if (frozen := config.get("frozen")) is not None:  # earlier saves have none
        for key, parameter in hne.named_parameters():
            parameter.requires_grad_(key not in frozen)
    hne.preparation = preparation_in(path, config)
    # Last: a memory format that was tuned is given to tensors that are there.
    hne.measurements = hne.saved_measurements[path.resolve()] = measurements_in(path, config)
    return hne.eval()


def scored_ensemble(path: Path) -> Path:
    """The directory of the ensemble that a run's last scores are of, or of an ensemble itself.

    A link is followed here, once: a run that goes on may let it name another state at any time.

    Args:
        path: a run, one of its checkpoints, or an ensemble.
    """
    path = path / LAST if (path / LAST).is_dir() else path
    path = path.parent / path.readlink() if path.is_symlink() else path
    return path / EMA if (path / EMA).is_dir() else path


def read_config(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """The configuration in a checkpoint directory.

    Args:
        path: the directory.
        verify: whether it must be, bit by bit, what was written.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    file = path / CONFIG
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, and no ensemble.",
            expected=f"a directory with {CONFIG} and {WEIGHTS}, written by treeify.save",
            next_step="Make an ensemble of the weights of a network:"
            f" treeify convert NAME --weights {path}",
        )
    if not file.is_file():
        raise CheckpointError(
            f"{path} holds no ensemble.",
            expected=f"a directory with {CONFIG} and {WEIGHTS}, written by treeify.save",
            found="no such directory" if not path.is_dir() else f"no {CONFIG}",
        )
    config = checksums.read_sealed(file, verify=verify)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        name = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{file} is of another format.",
            expected=f"format {FORMAT} (treeify {version('treeify')})",
            found=f"format {name}",
            next_step="Load it with the treeify version that wrote it.",
        )
    keys = ("identity", "architecture", "fingerprint", "splits", "example", "versions")
    missing = [key for key in keys if key not in config]
    if missing:
        raise CheckpointError(f"{file} is incomplete.", expected=f"the keys {', '.join(missing)}")
    return config


def weights_in(path: Path, config: Mapping[str, Any]) -> tuple[Path, str | None]:
    """Where a checkpoint's weights are, and their checksum; earlier versions wrote none.

    Raises:
        CheckpointError: the configuration does not say it as `treeify.save` does.
    """
    if checksums.FILES not in config:
        return path / WEIGHTS, None
    named = config[checksums.FILES]
    if isinstance(named, dict) and len(named) == 1:
        ((name, checksum),) = named.items()
        # No other names: the file is in the directory, whoever wrote the configuration.
        if WEIGHTS_NAME.fullmatch(name) and isinstance(checksum, str):
            return path / name, checksum
    raise CheckpointError(
        f"{path / CONFIG} does not name the weights.",
        expected=f"one file such as {WEIGHTS}, and its checksum",
        found=repr(named)[:200],
    )


def measurements_in(path: Path, config: Mapping[str, Any]) -> Measurements:
    """What a checkpoint's configuration says was measured; CheckpointError if that is damaged."""
    try:
        return MEASUREMENTS.validate_python(config)
    except (KeyError, TypeError, ValueError, TreeifyError) as error:
        raise CheckpointError(
            f"{path / CONFIG}: the measurements are damaged: {error!r}",
            next_step="Remove the keys execution, tunings, latencies and budgets, save what"
            " treeify.load(path, verify=False) gives, and measure again (treeify calibrate).",
        ) from error


def check_files(path: Path) -> None:
    """Look whether the files of a checkpoint are what was written.

    Raises:
        CheckpointError, SafetensorError, FileNotFoundError: they are not.
        OSError: they cannot be read.
    """
    with opened(path, read_config(path), verify=True):
        pass


def preparation_in(path: Path, config: Mapping[str, Any]) -> Preparation | None:
    """What a checkpoint's configuration says of images; None if nothing, as in earlier versions.

    Raises:
        CheckpointError: it is damaged.
    """
    if (values := config.get("preparation")) is None:
        return None
    try:
        return PREPARATION.validate_python(values)
    except (ValueError, TreeifyError) as error:
        raise CheckpointError(
            f"{path / CONFIG}: the preparation of images is damaged: {error}",
            next_step="Remove the key preparation, and save what treeify.load(path, verify=False)"
            " gives; treeify predict then takes --mean and --std.",
        ) from error


def untied(hne: HierarchicalEnsemble) -> dict[str, Tensor]:
    """The state with each tied tensor once, under its first name."""
    packed = dict(named_tensors(hne))
    names: dict[int, str] = {}
    for key in hne.state_dict():
        if key in packed:  # unlike the extra state of a module, which is as it was built
            names.setdefault(id(packed[key]), key)
    # safetensors stores a dense row-major tensor, whatever memory format it computes in.
    return {key: packed[key].detach().cpu().contiguous() for key in names.values()}


def unlisted(hne: HierarchicalEnsemble) -> dict[str, Tensor]:
    """What no state dict has, and no builder makes again.

    Of a model of the user's own, buffers that are not persistent; and attributes that are tensors,
    but no parameters and no buffers. The user may have drawn them.
    """
    tensors = {_CONSTANT + key: tensor for key, tensor in plain_tensors(hne.traced).items()}
    if hne.architecture is None or ":" in hne.architecture.name:
        listed = hne.state_dict().keys()
        buffers = {key: buffer for key, buffer in hne.named_buffers() if key not in listed}
        tensors |= {_BUFFER + key: buffer for key, buffer in buffers.items()}
    # Copies: safetensors refuses tensors that share memory.
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def is_unlisted(name: str) -> bool:
    """Whether a saved tensor is one of `unlisted`."""
    return name.startswith((_BUFFER, _CONSTANT))


def _with_constants(base: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The base model with its plain tensors as they were, which are taken out of the weights."""
    names = [key for key in weights if key.startswith(_CONSTANT)]
    if not names:
        return base
    base = copy.deepcopy(base)
    for key in names:
        tensor = weights.pop(key)
        # A model without such a module is another one, which its fingerprint will tell.
        with suppress(AttributeError):
            parent, name = get_parent(base, key.removeprefix(_CONSTANT))
            setattr(parent, name, tensor)
    return base


def _read(path: Path, *, verify: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's configuration and weights."""
    while True:
        config = read_config(path, verify=verify)
        file, _ = weights_in(path, config)
        try:
            with opened(path, config, verify=verify) as reader:
                names = reader.keys()
                return config, {name: reader.get_tensor(name) for name in names}
        except (CheckpointError, OSError, SafetensorError) as error:
            # Another process may have saved an ensemble over it in between.
            if read_config(path, verify=verify)["identity"] != config["identity"]:
                continue
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{file} is missing, truncated or damaged: {error}",
                next_step="Copy it again from where it was saved.",
            ) from error


@contextmanager
def opened(path: Path, config: Mapping[str, Any], *, verify: bool) -> Iterator[Any]:
    """Open a checkpoint's weights, which must be those that its configuration is of.

    Yields:
        A reader of safetensors.

    Raises:
        CheckpointError: they are others, or not what was written.
        OSError, SafetensorError: they are missing, truncated, or cannot be read.
    """
    file, checksum = weights_in(path, config)
    if verify and checksum is not None:
        checksums.check_file(file, checksum)
    # Opening compares the file's length with what its header says.
    with safe_open(file, framework="pt") as reader:
        if (reader.metadata() or {}).get("identity") != config["identity"]:
            raise CheckpointError(
                f"{path}: {file.name} and {CONFIG} come from different saves.",
                next_step="Save the ensemble again.",
            )
        yield reader


def _built(path: Path, config: Mapping[str, Any]) -> tuple[nn.Module, Architecture]:
    """The base model and how it was built; its weights do not matter, and no file is read."""
    if config["architecture"] is None:
        raise CheckpointError(
            f"{path} was made from a module of the user's own, which treeify cannot build.",
            expected="that base model beside the directory",
            next_step="Load it with treeify.load(path, model=...), or convert it by name"
            " ('package.module:function') to have the name saved.",
        )
    architecture = without_weights(Architecture.from_dict(config["architecture"]))
    try:
        expected = config["fingerprint"] if _is_comparable(config) else None
        return rebuild(architecture, expected), architecture
    except ModelError as error:
        raise CheckpointError(
            f"{path} holds all weights, but its architecture {str(architecture)!r} cannot be built"
            f" here: {error}",
            next_step="Install or put on PYTHONPATH what builds it, or give the base model:"
            " treeify.load(path, model=...).",
        ) from error


def _is_comparable(config: Mapping[str, Any]) -> bool:
    """Whether fingerprints are: under the same versions of the libraries."""
    return bool(config["versions"] == versions_of(*MODEL_LIBRARIES))


def _check_fingerprint(path: Path, config: Mapping[str, Any], hne: HierarchicalEnsemble) -> None:
    # Under other versions shapes decide.
    if _is_comparable(config) and config["fingerprint"] != fingerprint(hne.skeleton):
        raise CheckpointError(
            f"{path}: the base model differs from the one that was saved.",
            expected="the same layers, widths and options",
            found=f"{type(hne.skeleton).__name__} built from {hne.architecture or 'model='}",
        )


@torch.no_grad()
def _fill(path: Path, hne: HierarchicalEnsemble, weights: dict[str, Tensor]) -> None:
    """Put saved tensors in the places of an ensemble's own."""
    buffers = dict(hne.named_buffers())
    for key in [key for key in weights if key.startswith(_BUFFER)]:
        tensor = weights.pop(key).clone()
        if (buffer := buffers.get(key.removeprefix(_BUFFER))) is not None:
            buffer.data = tensor
    state = untied(hne)
    for key in sorted(state.keys() ^ weights.keys()):
        raise CheckpointError(
            f"{path}: the weights do not match the configuration.",
            expected=f"a tensor {key!r}" if key in state else f"no tensor {key!r}",
            found=f"{len(weights)} tensors where the model has {len(state)}",
        )
    for key, tensor in weights.items():
        packed = get_tensor(hne, key)
        if packed.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: the weights do not match the configuration.",
                expected=f"{key!r} of shape {tuple(packed.shape)}",
                found=f"shape {tuple(tensor.shape)}",
            )
        # A copy: what safetensors returns is mapped from the file, which may be replaced later.
        packed.data = tensor.clone()
