"""What training images go through, at random, instead of the held-out images' way."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from treeify.data.image_files import to_channels
from treeify.data.preparation import Preparation
from treeify.errors import DataError


def padded_crop(
    size: int | Sequence[int], crop_padding: int, flip: bool, fill: float = 0.0
) -> v2.Compose:
    """Random crops of pixels reaching into a border, and mirror images."""
    crop = [v2.RandomCrop(size, padding=crop_padding, fill=fill)] if crop_padding else []
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([v2.Identity(), *crop, *mirror])


class Padded:
    """Images in their size, cropped at random within a border of black, and mirrored."""

    def __init__(self, preparation: Preparation, crop_padding: int, flip: bool) -> None:
        self.preparation = preparation
        self.crop = padded_crop(preparation.size, crop_padding, flip)

    def __call__(self, image: Image.Image) -> Tensor:
        """An opened image as floats `[C, H, W]`."""
        return self.preparation.normalise(self.crop(self.preparation.pixels(image)))


class ResizedCrop:
    """What timm does with training images: random crops of any size, and its policies."""

    def __init__(
        self, preparation: Preparation, flip: bool, auto_augment: str | None, random_erasing: float
    ) -> None:
        """Build timm's transforms, in the preparation's size, channels and statistics.

        Raises:
            DataError: timm has no such policy, or it cannot be had for these channels.
        """
        if auto_augment and preparation.channels == 4:
            raise DataError(
                "auto_augment changes colours, and images of 4 channels have more.",
                next_step="Leave auto_augment out, or set data.channels=3.",
            )
        self.channels = preparation.channels
        try:
            spatial, coloured, self.normalise = create_transform(
                preparation.size,
                is_training=True,
                mean=preparation.mean or (),
                std=preparation.std or (),
                interpolation=preparation.interpolation,
                hflip=0.5 if flip else 0.0,
                color_jitter=0.0,
                auto_augment=auto_augment,
                re_prob=random_erasing,
                separate=True,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise DataError(
                f"auto_augment={auto_augment!r} is no policy of timm's: {error}",
                expected="e.g. rand-m9-mstd0.5, augmix-m3-w3 or original",
            ) from error
        self.augment = v2.Compose([spatial, coloured])

    def __call__(self, image: Image.Image) -> Tensor:
        """An opened image as floats `[C, H, W]`."""
        # timm's policies fill with a colour, which grey images do not have.
        augmented: Any = self.augment(to_channels(image, max(3, self.channels)))
        tensor: Tensor = self.normalise(to_channels(augmented, self.channels))
        return tensor
