"""The paper's own base networks, plain PyTorch."""

from treeify.models.cifar_resnet import CifarResNet, cifar_resnet50

__all__ = ["CifarResNet", "cifar_resnet50"]
