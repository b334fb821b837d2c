"""What the configuration of a saved ensemble may say: checked before anything is built of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from treeify.conversion.splits import parse
from treeify.errors import CheckpointError, SplitError

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

MOST_BYTES = 2**24
# An example is computed on, and as many images as the model needs; any real one is far smaller.
MOST_VALUES = 2**28
_Name = Annotated[str, Field(max_length=1000)]
# Levels without weights, which earlier versions accepted, have leaves that no tensor shows.
_LEAVES_ON_TRUST = 4096
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Architecture(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: _Name
    kwargs: dict[str, JsonValue]


class _Config(BaseModel):
    """The keys every version writes; what was measured is checked by itself."""

    model_config = ConfigDict(extra="allow", strict=True)

    identity: str | None
    architecture: _Architecture | None
    fingerprint: str
    splits: list[_Name] = Field(max_length=1000)
    example: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=8)
    batch: int = Field(default=1, ge=1)
    versions: dict[str, str | None]
    frozen: list[str] | None = None

    @model_validator(mode="after")
    def _example_fits_memory(self) -> Self:
        if (count := self.batch * math.prod(self.example)) > MOST_VALUES:
            raise PydanticCustomError(
                "example",
                f"Input should be an example of at most {MOST_VALUES:,} values; it has"
                f" {count if count < 2**63 else 'far more'}",
            )
        return self


def check_values(file: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the values of a configuration can be those of an ensemble."""
    keys = ("identity", "architecture", "fingerprint", "splits", "example", "versions")
    missing = [key for key in keys if key not in config]
    if missing:
        raise CheckpointError(f"{file} is incomplete.", expected=f"the keys {', '.join(missing)}")
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc'])) or 'example'}: {detail['msg']}"
            for detail in error.errors()[:5]
        ]
        raise CheckpointError(
            f"{file} is damaged.",
            expected="what treeify.save wrote",
            found="; ".join(problems),
            next_step="Copy it again from where it was saved.",
        ) from error


def check_leaves(path: Path, splits: Iterable[str], weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a tree would have leaves that no tensor has room for."""
    # Every tensor of the last level holds one part for each leaf, along dim 0.
    try:
        leaves = math.prod(fanout or 1 for _, fanout in map(parse, splits))
    except SplitError as error:
        raise CheckpointError(f"{path}: its configuration is damaged: {error}") from error
    most = max((tensor.shape[0] for tensor in weights.values() if tensor.ndim), default=0)
    if leaves > max(most, _LEAVES_ON_TRUST):
        raise CheckpointError(
            f"{path}: the weights do not match the configuration.",
            expected=f"weights of at most {most:,} leaves, as there are",
            found=f"splits with {leaves if leaves < 2**63 else 'far more'} leaves",
        )


def check_dtype(path: Path, key: str, packed: Tensor, saved: Tensor) -> None:
    """Raise CheckpointError for a tensor of another kind; the precision of floats may differ."""
    both = {packed.dtype, saved.dtype}
    if len(both) > 1 and not both <= set(_COMPUTED):
        raise CheckpointError(
            f"{path}: the weights do not match the configuration.",
            expected=f"{key!r} of {packed.dtype}",
            found=f"{saved.dtype}",
        )
