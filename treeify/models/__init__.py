"""The paper's own base networks, plain PyTorch."""

from treeify.models.cifar_resnet import CifarResNet, cifar_resnet50
from treeify.models.mobilenet_v2 import MobileNetV2, mobilenetv2_hne

__all__ = ["CifarResNet", "MobileNetV2", "cifar_resnet50", "mobilenetv2_hne"]
