"""A name comes in; out goes a base model, how to build it again and what it is fed.

Models of timm, torchvision and the user's code are built, recognised and never changed; the paper's
own networks are here.
"""

from treeify.models.cifar_resnet import CifarResNet, cifar_resnet50
from treeify.models.mobilenet_v2 import MobileNetV2, mobilenetv2_hne

__all__ = ["CifarResNet", "MobileNetV2", "cifar_resnet50", "mobilenetv2_hne"]
