"""Whether images fit a model: their shape, and whether it can compute with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from treeify.errors import InputError


class InputCheck:
    """Refuses what cannot be images for a model.

    Args:
        example: the shape of an image `(C, H, W)` that the model was traced with.
        one_size: the model takes no other height and width.
    """

    def __init__(self, example: tuple[int, ...], *, one_size: bool) -> None:
        self.example, self.one_size = example, one_size
        self._computable: set[tuple[torch.dtype, torch.dtype, bool]] = set()
        self._places: set[tuple[object, ...]] = set()

    def check_shape(self, x: Any) -> None:
        """Raise InputError unless it is a tensor `[N, C, H, W]` with the model's channels."""
        fixed = len(self.example) if self.one_size else 1
        is_batch = isinstance(x, Tensor) and x.ndim == len(self.example) + 1
        if is_batch and x.shape[1 : 1 + fixed] == self.example[:fixed]:
            return
        hint = "" if self.one_size else " (H and W as far as the base model allows)"
        kind = type(x)
        is_tensor = isinstance(x, Tensor)
        raise InputError(
            "the input does not fit the model.",
            expected=f"images of shape [N, {', '.join(map(str, self.example))}]{hint}",
            found=f"shape {tuple(x.shape)}" if is_tensor else f"{kind.__module__}.{kind.__name__}",
            next_step=_remedy(x, len(self.example)),
        )

    def require_images(self, x: Tensor) -> None:
        """Refuse batches of nothing: their statistics are no numbers, and stay in a model.

        Raises:
            InputError: there is no image, or they have no pixels.
        """
        if 0 in x.shape:
            raise InputError(
                "there are no images.",
                expected="at least one, of one pixel or more",
                found=f"shape {tuple(x.shape)}",
                next_step="Leave empty batches out.",
            )

    def check_place(
        self, x: Tensor, device: torch.device, run: Callable[[Tensor], Exception | None]
    ) -> None:
        """Refuse images on a device, in a layout or of a number that the model does not take.

        Hooks may move images, and many models take none: it is tried, once for each kind.

        Args:
            x: images, `[N, C, H, W]`.
            device: of the model's parameters.
            run: as of `check_dtype`.

        Raises:
            InputError: it does not.
        """
        is_empty = 0 in x.shape
        if not is_empty and x.layout is torch.strided and x.device == device:
            return
        case = (x.layout, x.device, device, x.dtype, tuple(x.shape) if is_empty else ())
        if case in self._places:
            return
        if (error := run(x)) is None:
            self._places.add(case)
            return
        if x.layout is torch.strided and x.device == device:
            self.require_images(x)
        raise InputError(
            "the images are elsewhere than the model.",
            expected=f"a dense tensor on {device}, as its parameters",
            found=f"{x.layout} on {x.device}",
            next_step=f"Convert them: x.to({str(device)!r}); a sparse one first by x.to_dense().",
        ) from error

    def check_dtype(
        self, x: Tensor, dtype: torch.dtype, run: Callable[[Tensor], Exception | None]
    ) -> None:
        """Refuse images of a dtype that the model cannot compute with.

        Autocast converts images, and so may the model: where theirs is not the parameters' dtype,
        the model is tried on them, once for each dtype.

        Args:
            x: images, `[N, C, H, W]`.
            dtype: of the model's parameters.
            run: computes with images, and returns what was raised, if anything was.

        Raises:
            InputError: it cannot.
        """
        if x.dtype == dtype:
            return
        case = (x.dtype, dtype, torch.is_autocast_enabled(x.device.type))
        if case in self._computable:
            return
        if (error := run(x)) is None:
            self._computable.add(case)
        elif run(x.to(dtype)) is None:  # else something else is wrong as well
            raise InputError(
                "the images' dtype does not fit the model.",
                expected=f"{dtype}, as its parameters",
                found=f"{x.dtype}",
                next_step="Convert them: x.float() / 255, normalised as in training."
                if x.dtype == torch.uint8
                else f"Convert them: x.to({dtype}).",
            ) from error


def _remedy(x: Any, dims: int) -> str | None:
    """How to make a batch of images of what is none."""
    if isinstance(x, Tensor):
        return "A single image becomes a batch by x[None]." if x.ndim == dims else None
    if hasattr(x, "__array__"):
        return (
            "Convert it: torch.from_numpy(x), of pixels 0 to 255 then .float() / 255, normalised as"
            " in training; channels come before height and width."
        )
    return None
