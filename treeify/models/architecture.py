"""The name of a base model and the arguments of its builder, as a checkpoint holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from treeify.errors import ModelError
from treeify.models.builders import find_builder
from treeify.models.downloads import without_retries


@dataclass(frozen=True)
class Architecture:
    """How to build a base model: its name and the arguments of its builder.

    Args:
        name: timm's name (`mobilenetv2_140`, also `timm/mobilenetv2_140`), `torchvision/resnet50`,
            or `package.module:function` for any function that returns a module.
        kwargs: the builder's keyword arguments; JSON values only, tuples become lists.

    Raises:
        ModelError: an argument is no JSON value.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            kwargs = json.loads(json.dumps(dict(self.kwargs)))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"arguments of {self.name!r} cannot be written to a checkpoint: {error}.",
                expected="numbers, strings, booleans, None, and lists or dicts of them",
                found=f"{dict(self.kwargs)!r}",
                next_step="Wrap the model in a function of simple arguments, as 'module:function'.",
            ) from error
        object.__setattr__(self, "kwargs", kwargs)

    def build(self, pretrained: bool = False) -> nn.Module:
        """A new model, initialised from torch's global random state as it stands.

        Args:
            pretrained: load the trained weights that timm or torchvision offer under this name
                (needs the network or their cache); a builder function gets `pretrained=True`.

        Returns:
            The model, in training mode.

        Raises:
            ModelError: the name is unknown, the builder refuses the arguments, or trained weights
                cannot be had.
        """
        builder = find_builder(self.name, pretrained)
        try:
            with without_retries():
                model = builder(**self.kwargs)
        except Exception as error:
            raise self._failed(error, pretrained) from error
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"{self.name!r} builds no model.",
                expected="a torch.nn.Module",
                found=f"{type(model).__name__} {model!r:.100}",
            )
        return model

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """The architecture whose `dataclasses.asdict` was written as JSON.

        Raises:
            ModelError: `data` is not of that form.
        """
        match data:
            case {"name": str(name), "kwargs": Mapping() as kwargs} if len(data) == 2:
                return cls(name, kwargs)
        raise ModelError(
            "not a description of an architecture.",
            expected="{'name': a string, 'kwargs': a mapping}",
            found=repr(data),
        )

    def __str__(self) -> str:
        """`name(key=value, ...)`, or the bare name if there are no arguments."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"{self.name}({arguments})" if arguments else self.name

    def _failed(self, error: Exception, pretrained: bool) -> ModelError:
        """What to say where the builder raised something."""
        reason = f"{type(error).__name__}: {error}"
        # urllib's, the operating system's and the model hub's connection errors are all OSErrors.
        if pretrained and isinstance(error, OSError):
            return ModelError(
                f"the pretrained weights of {self.name!r} could not be downloaded.",
                expected="network access or a filled download cache, as pretrained was asked for",
                found=reason,
                next_step="Connect and try again, or name a file of weights that you have"
                " (--weights PATH), or leave pretrained out for random weights.",
            )
        return ModelError(
            f"{self.name!r} could not be built"
            f"{' with pretrained weights' if pretrained else ''} from {dict(self.kwargs)}.",
            expected="arguments its builder accepts",
            found=reason,
            next_step=self._advice(),
        )

    def _advice(self) -> str | None:
        """What to change in a builder of the user's own."""
        if ":" not in self.name:
            return None
        if isinstance(find_builder(self.name), nn.Module):
            return f"{self.name} is a network already: name the class or function that builds it."
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return (
            f"It is called as {self.name.partition(':')[2]}({arguments}): give it these arguments,"
            " and all others a default, or a recipe their values (model.kwargs)."
        )
