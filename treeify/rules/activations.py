"""Activations: functions of single numbers, so packed channels run as they are."""

from __future__ import annotations

import timm.layers.activations as timm_act
from torch import nn

from treeify.rules.call import Call
from treeify.rules.operations.channels import PackedPReLU
from treeify.rules.operations.direct import Direct
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import unchanged, widened

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Softplus, nn.Softsign),
    *(nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Identity),
    *(timm_act.Swish, timm_act.Mish, timm_act.Sigmoid, timm_act.Tanh, timm_act.HardSwish),
    *(timm_act.HardSigmoid, timm_act.HardMish, timm_act.GELU, timm_act.GELUTanh),
    timm_act.QuickGELU,
)


widens(*ACTIVATIONS)(unchanged)
rule(*ACTIVATIONS, pure=True)(widened)


@batch_rule(*ACTIVATIONS, pure=True)
def run_activation(call: Call) -> Direct:
    """Activations in the batch."""
    call.batch_facts()
    return Direct(call.target)


@rule(nn.PReLU)
def pack_prelu(call: Call) -> PackedPReLU:
    """PReLU, whose slopes each branch has of its own."""
    call.input_facts()
    return PackedPReLU(call.packed_module, call.branches)
