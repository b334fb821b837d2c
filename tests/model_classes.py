"""The smallest model of every class of timm and torchvision, shallower or narrower where it can be.

Found by building every name on the meta device; `test_classes.py` holds it against the rows of
`treeify verify`.
"""

from dataclasses import dataclass, field
from typing import Any

from treeify.models import shallow
from treeify.models.architecture import Architecture


@dataclass(frozen=True)
class Case:
    """A class and the model that stands for it.

    Args:
        network: the class's name.
        name: the model's, as `treeify convert` takes it.
        size: height and width of its images.
        options: what its builder is given besides 10 classes.
        blocks: how many of one shape follow one another at most; the others are left out.
    """

    network: str
    name: str
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    blocks: int | None = None

    @property
    def architecture(self) -> Architecture:
        """What builds it, with 10 classes."""
        whole = Architecture(self.name, {"num_classes": 10, **self.options})
        return whole if self.blocks is None else shallow.cut(whole, self.blocks)

    @property
    def library(self) -> str:
        return "torchvision" if self.name.startswith("torchvision/") else "timm"


# An aligned Xception of four narrow blocks.
_ALIGNED = (
    {"in_chs": 64, "out_chs": 32, "stride": 2},
    {"in_chs": 32, "out_chs": 32, "stride": 1},
    {"in_chs": 32, "out_chs": (48, 48, 64), "stride": 2},
    {"in_chs": 64, "out_chs": (64, 64, 96), "stride": 1, "no_skip": True},
)

CASES = (
    Case("Beit", "beit_base_patch16_224", options={"depth": 2, "img_size": 64}),
    Case("ByobNet", "test_byobnet"),
    Case("CPUBone", "cpubone_nano"),
    Case("CSATv2", "csatv2", options={"depths": [1, 1, 2, 2], "transformer_depths": [0, 0, 1, 1]}),
    Case("Cait", "cait_xxs24_224", options={"depth": 2, "img_size": 64}),
    Case(
        "CoaT",
        "coat_tiny",
        options={"img_size": 64, "serial_depths": [1, 1, 1, 1], "parallel_depth": 1},
        blocks=1,
    ),
    Case("ConVit", "convit_tiny", options={"depth": 2, "img_size": 64}),
    Case("ConvMixer", "convmixer_768_32", blocks=1),
    Case("ConvNeXt", "test_convnext", options={"depths": [1, 1, 1, 1]}),
    Case("CrossVit", "crossvit_tiny_240", 240, options={"depth": [[1, 1, 0]] * 3}),
    Case("CspNet", "cs3darknet_focus_s"),
    Case("CspNext", "cspnext_tiny"),
    Case("DLA", "dla46x_c"),
    Case("DPN", "dpn48b", blocks=1),
    Case("DaVit", "davit_tiny", options={"depths": [1, 1, 1, 1], "embed_dims": [24, 48, 96, 192]}),
    Case(
        "DeepseekVitClassifier",
        "deepseek_vit_412m",
        224,
        options={"depth": 2, "img_size": 224, "embed_dim": 64},
    ),
    Case(
        "DeepseekVitEncoder",
        "deepseek_vit_412m_enc",
        224,
        options={"depth": 2, "img_size": 224, "embed_dim": 64},
    ),
    Case("DenseNet", "densenet121", options={"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    Case("EdgeNeXt", "edgenext_xx_small", options={"depths": [1, 1, 1, 1]}),
    Case("EfficientFormer", "efficientformer_l1", 224, blocks=1),
    Case("EfficientFormerV2", "efficientformerv2_s0", options={"img_size": 64}, blocks=1),
    Case("EfficientNet", "test_efficientnet"),
    Case("EfficientViM", "efficientvim_m1", options={"depths": [1, 1, 1]}),
    Case("EfficientViMDistilled", "efficientvim_m1_dist", options={"depths": [1, 1, 1]}),
    Case("EfficientVit", "efficientvit_b0", options={"depths": [1, 1, 1]}),
    Case("EfficientVitLarge", "efficientvit_l1", options={"depths": [1, 1, 1]}),
    Case("EfficientVitMsra", "efficientvit_m0", options={"img_size": 64, "depth": [1, 1, 1]}),
    Case("Eva", "vit_tiny_patch16_dinov3_qkvb", options={"depth": 2, "img_size": 64}),
    Case("FastVit", "fastvit_t8", blocks=1),
    Case("FasterNet", "fasternet_t0", options={"depths": [1, 1, 1]}),
    Case("FocalNet", "focalnet_tiny_srf", blocks=1),
    Case("Gemma4VitClassifier", "gemma4_vit_167m", options={"depth": 2}),
    Case("Gemma4VitEncoder", "gemma4_vit_167m_enc", 96, options={"depth": 2}),
    Case("GhostNet", "ghostnet_050"),
    Case("GlobalContextVit", "gcvit_xxtiny", options={"embed_dim": 16, "img_size": 64}),
    Case(
        "Hiera",
        "hiera_tiny_224",
        options={"stages": [1, 1, 1, 1], "embed_dim": 32, "img_size": 64},
    ),
    Case("HieraDet", "sam2_hiera_tiny", blocks=1),
    Case("HighPerfGpuNet", "hgnetv2_b0"),
    Case("HighResolutionNet", "hrnet_w18_small"),
    Case("IFormer", "iformer_t", blocks=1),
    Case("InceptionResnetV2", "inception_resnet_v2", 96, blocks=1),
    Case("InceptionV3", "inception_v3", 128, blocks=1),
    Case("InceptionV4", "inception_v4", 96, blocks=1),
    Case("LCNetV2", "lcnetv2_small", options={"depths": [1, 1, 1, 1]}),
    Case("Levit", "levit_256d", 224, options={"depth": [1, 1, 1]}),
    Case("LevitDistilled", "levit_128s", 224, blocks=1),
    Case("LowFormer", "lowformer_b0", blocks=1),
    Case("MambaOut", "test_mambaout", options={"depths": [1, 1, 1]}),
    Case("MaxxVit", "test_coatnet", options={"depths": [1, 1, 1, 1], "img_size": 64}),
    Case("MetaFormer", "poolformerv2_s12", blocks=1),
    Case("MetaNeXt", "inception_next_atto", options={"depths": [1, 1, 1]}),
    Case("MlpMixer", "gmlp_ti16_224", options={"img_size": 64}, blocks=1),
    Case("MobileNetV3", "lcnet_035"),
    Case("MobileNetV5", "mobilenetv5_base", options={"channel_multiplier": 0.25}, blocks=1),
    Case(
        "MobileNetV5Encoder", "mobilenetv5_300m_enc", options={"channel_multiplier": 0.1}, blocks=1
    ),
    Case("MultiScaleVit", "mvitv2_tiny", blocks=1),
    Case("NASNetALarge", "nasnetalarge", options={"stem_size": 24, "num_features": 480}),
    Case("NaFlexVit", "naflexvit_base_patch16_parfac_gap", options={"depth": 2}),
    Case("Nest", "nest_tiny", options={"img_size": 64}, blocks=1),
    Case("NextViT", "nextvit_small", blocks=1),
    Case("NormFreeNet", "test_nfnet", options={"depths": [1, 1, 1]}),
    Case("PNASNet5Large", "pnasnet5large"),
    Case("PoolingVisionTransformer", "pit_ti_224", options={"img_size": 64}),
    Case("PyramidVisionTransformerV2", "pvt_v2_b0", options={"depths": [1, 1, 1, 1]}),
    Case("Qwen3VitClassifier", "qwen3_vit_88m", options={"depth": 2, "img_size": 64}),
    Case("Qwen3VitEncoder", "qwen3_vit_88m_enc", options={"depth": 2, "img_size": 64}),
    Case("RDNet", "rdnet_tiny", options={"growth_rates": [8] * 7, "num_init_features": 16}),
    Case("RegNet", "regnetx_002"),
    Case("RepGhostNet", "repghostnet_050"),
    Case("RepVit", "repvit_m1", blocks=1),
    Case("ResNet", "test_resnet"),
    Case("ResNetV2", "resnetv2_18", options={"layers": [1, 1, 1]}),
    Case("RexNet", "rexnet_100", blocks=1),
    Case("SENet", "legacy_seresnet18", options={"layers": [1, 1, 1, 1]}),
    Case("SHViT", "shvit_s1", blocks=1),
    Case("SelecSls", "selecsls42"),
    Case("Sequencer2d", "sequencer2d_s", options={"layers": [1, 1, 1, 1]}),
    Case("StarNet", "starnet_s050", options={"depths": [1, 1, 1]}),
    Case("SwiftFormer", "swiftformer_xs"),
    Case(
        "SwinTransformer",
        "swin_tiny_patch4_window7_224",
        options={"depths": [1, 1, 1], "img_size": 64},
    ),
    Case(
        "SwinTransformerV2",
        "swinv2_tiny_window16_256",
        options={"depths": [1, 1, 1], "img_size": 64},
    ),
    Case(
        "SwinTransformerV2Cr", "swinv2_cr_tiny_224", options={"depths": [1, 1, 1], "img_size": 64}
    ),
    Case("TNT", "tnt_s_legacy_patch16_224", options={"depth": 2, "img_size": 64}),
    Case("TResNet", "tresnet_m", options={"layers": [1, 1, 1, 1]}),
    Case("TinyVit", "tiny_vit_5m_224", blocks=1),
    Case("Twins", "twins_svt_small", options={"depths": [1, 1, 1, 1]}),
    Case("VGG", "vgg11", options={"mlp_ratio": 0.05}),
    Case("VOLO", "volo_d1_224", options={"img_size": 64}, blocks=1),
    Case("Visformer", "visformer_tiny", options={"depth": 2, "img_size": 64}),
    Case("VisionTransformer", "test_vit", options={"depth": 2, "img_size": 64}),
    Case(
        "VisionTransformerDistilled",
        "deit_tiny_distilled_patch16_224",
        options={"depth": 2, "img_size": 64},
    ),
    Case("VisionTransformerRelPos", "test_vit_relpos", options={"depth": 2, "img_size": 64}),
    Case("VisionTransformerSAM", "samvit_base_patch16_224", options={"depth": 2, "img_size": 64}),
    Case("VovNet", "ese_vovnet19b_slim_dw"),
    Case("Xception", "legacy_xception", blocks=1),
    Case("XceptionAligned", "xception41p", options={"block_cfg": _ALIGNED}),
    Case("Xcit", "xcit_nano_12_p8_224", options={"depth": 2, "img_size": 64}),
    Case("ResNet", "torchvision/resnet18"),
    Case("MobileNetV2", "torchvision/mobilenet_v2"),
    Case("MobileNetV3", "torchvision/mobilenet_v3_small"),
    Case("SwinTransformer", "torchvision/swin_t", blocks=1),
    Case("VGG", "torchvision/vgg11"),
    Case("EfficientNet", "torchvision/efficientnet_b0"),
    Case("ShuffleNetV2", "torchvision/shufflenet_v2_x0_5"),
    Case("MaxVit", "torchvision/maxvit_t", 224, blocks=1),
    Case("DenseNet", "torchvision/densenet121", blocks=1),
    Case("AlexNet", "torchvision/alexnet"),
    Case("SqueezeNet", "torchvision/squeezenet1_1"),
    Case("Inception3", "torchvision/inception_v3", 96, options={"aux_logits": False}, blocks=1),
    Case("GoogLeNet", "torchvision/googlenet"),
    Case("MNASNet", "torchvision/mnasnet0_5"),
    Case("ConvNeXt", "torchvision/convnext_tiny", blocks=1),
    Case("RegNet", "torchvision/regnet_y_400mf"),
    Case("VisionTransformer", "torchvision/vit_b_16", options={"image_size": 64}, blocks=1),
)
