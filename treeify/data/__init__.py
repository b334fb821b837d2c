"""Data sets by name: images ready to train on, and a fixed held-out part.

Every data set is a function of keyword options that returns a `Data`; a recipe names the function
and sets its options. Adding one:

    @treeify.data.register("my_images")
    def my_images(*, root: treeify.registry.FilePath) -> treeify.data.Data: ...

or name it in the recipe as `package.module:my_images`.
"""

from treeify.data import timm_utils  # noqa: F401 - before any other module imports timm's
from treeify.data.conventions import (
    CIFAR10,
    CIFAR100,
    DIGITS,
    FASHION_MNIST,
    IMAGENET,
    Statistics,
    transform_options,
)
from treeify.data.data_set import SOURCES, Data, Examples, register
from treeify.data.image_files import UnreadableImageError, open_image
from treeify.data.image_folders import image_folder
from treeify.data.preparation import Preparation
from treeify.data.small_images import cifar10, cifar100, digits, fashion_mnist
from treeify.data.timm_datasets import timm_dataset
from treeify.data.webdataset_shards import webdataset

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DIGITS",
    "FASHION_MNIST",
    "IMAGENET",
    "SOURCES",
    "Data",
    "Examples",
    "Preparation",
    "Statistics",
    "UnreadableImageError",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "image_folder",
    "open_image",
    "register",
    "timm_dataset",
    "transform_options",
    "webdataset",
]
