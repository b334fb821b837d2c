"""Attention: branches in the batch are more images that attend to themselves."""

import torch.nn.functional as F
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import require_aligned
from treeify.rules.image_by_image import to_batch
from treeify.rules.operations.attention import MaskedAttention, PackedSelfAttention
from treeify.rules.operations.direct import Direct
from treeify.rules.table import batch_rule, rule

_OPERANDS = ("query", "key", "value")

rule(F.scaled_dot_product_attention, pure=True)(to_batch)


@batch_rule(F.scaled_dot_product_attention, first=True)
def run_attention(call: Call) -> Direct | MaskedAttention:
    """Attention of every image to itself."""
    result = call.result_facts()
    assert result.batch_dim is not None
    if result.batch_dim > len(result.shape) - 3:
        raise Unpackable("the batch is a dim of its matrices")
    operands = [call.tensor(call.argument(*place)) for place in enumerate(_OPERANDS)]
    if any(operand is None or operand.batch_dim is None for operand in operands):
        raise Unpackable("an operand has no batch dim")
    mask_argument = call.argument(3, "attn_mask")
    mask = call.tensor(mask_argument)
    require_aligned([*operands, mask], result)
    if mask is None or mask.batch_dim is not None or mask_argument not in call.varying:
        return Direct(call.target)
    if len(call.node.args) not in (0, 3) and len(call.node.args) < 4:
        raise Unpackable("its arguments are given in an unusual way")
    return MaskedAttention(mask, result.batch_dim)


@batch_rule(nn.MultiheadAttention, first=True)
def run_self_attention(call: Call) -> PackedSelfAttention:
    """Self-attention without masks that returns no attention weights."""
    module, operand = call.module, call.batch_facts()
    if operand.batch_dim != 0 or len(operand.shape) != 3 or not module.batch_first:
        raise Unpackable("its input does not begin with the batch")
    inputs = {call.argument(*place) for place in enumerate(_OPERANDS)}
    masks = [call.argument(3, "key_padding_mask"), call.argument(5, "attn_mask")]
    if len(inputs) != 1 or any(mask is not None for mask in masks):
        raise Unpackable("it attends to other tokens, or with a mask")
    if call.argument(4, "need_weights", True) or call.node.kwargs.get("is_causal"):
        raise Unpackable("its attention weights are asked for")
    plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    if not plain:
        raise Unpackable("it has projections of several sizes, or biases of its own")
    return PackedSelfAttention(module, call.packed_module, call.branches)
