"""Matrix products and attention: branches in the batch are more images of the same product."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeify.engine.packed_tensors import narrow
from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import Direct, require_aligned, with_parameters
from treeify.rules.linear import linear
from treeify.rules.table import batch_rule
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span


@batch_rule(torch.matmul, operator.matmul, "matmul", torch.bmm, "bmm", pure=True, first=True)
def run_product(call: Call) -> nn.Module:
    """Products of every image's matrices, with each other or with a matrix of each branch."""
    result = call.facts.value
    if not isinstance(result, TensorFacts) or result.batch_dim is None:
        raise Unpackable("its result has no batch dim")
    if len(call.node.args) != 2:
        raise Unpackable("an operand is given by keyword")
    if result.batch_dim > len(result.shape) - 3:
        raise Unpackable("the batch is a dim of its matrices")
    operands = [call.tensor(argument) for argument in call.node.args]
    require_aligned(operands, result)
    return with_parameters(call, torch.matmul, operands, result)


class MaskedAttention(nn.Module):
    """Attention with a mask or bias of each branch, the same for all images."""

    def __init__(self, mask: TensorFacts, dim: int) -> None:
        super().__init__()
        self.mask, self.dim = mask, dim

    def forward(
        self,
        span: Span,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """`[G*N, heads, T, D]` and a mask `[G, 1, heads, T, T]` -> `[G*N, heads, T, D]`."""
        missing = [1] * (query.ndim - len(self.mask.shape))
        mask = attn_mask.reshape(span.size, *missing, *attn_mask.shape[1:]).movedim(0, self.dim)
        images = query.shape[self.dim] // span.size
        shape = list(mask.shape)
        shape[self.dim + 1] = images
        mask = mask.expand(shape).flatten(self.dim, self.dim + 1)
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)


@batch_rule(F.scaled_dot_product_attention, first=True)
def run_attention(call: Call) -> nn.Module:
    """Attention of every image to itself."""
    result = call.facts.value
    if not isinstance(result, TensorFacts) or result.batch_dim is None:
        raise Unpackable("its result has no batch dim")
    if result.batch_dim > len(result.shape) - 3:
        raise Unpackable("the batch is a dim of its matrices")
    arguments = [call.argument(*where) for where in enumerate(("query", "key", "value"))]
    operands = [call.tensor(argument) for argument in arguments]
    if any(known is None or known.batch_dim is None for known in operands):
        raise Unpackable("an operand has no batch dim")
    mask_argument = call.argument(3, "attn_mask")
    mask = call.tensor(mask_argument)
    require_aligned([*operands, mask], result)
    if mask is None or mask.batch_dim is not None or mask_argument not in call.varying:
        return Direct(call.node.target)
    if len(call.node.args) not in (0, 3) and len(call.node.args) < 4:
        raise Unpackable("its arguments are given in an unusual way")
    return MaskedAttention(mask, result.batch_dim)


class EinsumOfBranches(nn.Module):
    """Products of images with tensors of each branch: one letter more, for the branches.

    Args:
        sources: the base model's subscripts of each operand.
        target: those of the result.
        dims: where each operand holds the batch; None for one value a branch, and -1 for one value
            for all branches.
        dim: where the result holds it.
    """

    def __init__(
        self, sources: Sequence[str], target: str, dims: Sequence[int | None], dim: int
    ) -> None:
        super().__init__()
        branch = next(
            letter for letter in ascii_letters if letter not in (*target, *"".join(sources))
        )

        def with_branch(subscripts: str, at: int | None) -> str:
            at = at or 0
            return subscripts if at < 0 else subscripts[:at] + branch + subscripts[at:]

        given = map(with_branch, sources, dims)
        self.equation = f"{','.join(given)}->{with_branch(target, dim)}"
        self.dims, self.dim = dims, dim

    def forward(self, span: Span, equation: str, *operands: Tensor) -> Tensor:
        """`[..., G*N, ...]`, from such operands and `[G, ...]`."""
        given = [
            operand if at is None or at < 0 else torch.unflatten(operand, at, (span.size, -1))
            for operand, at in zip(operands, self.dims, strict=True)
        ]
        result: Tensor = torch.einsum(self.equation, *given)
        return result.flatten(self.dim, self.dim + 1)

    def extra_repr(self) -> str:
        """The equation that runs."""
        return self.equation


@batch_rule(torch.einsum, first=True)
def run_einsum(call: Call) -> nn.Module:
    """Products whose subscripts keep the batch in one letter."""
    equation, *arguments = call.node.args
    operands = [call.tensor(argument) for argument in arguments]
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise Unpackable("its equation is not spelled out")
    result = call.facts.value
    if not isinstance(result, TensorFacts) or result.batch_dim is None:
        raise Unpackable("its result has no batch dim")
    left, target = equation.replace(" ", "").split("->")
    sources = left.split(",")
    letter = target[result.batch_dim]
    dims: list[int | None] = []
    for known, subscripts, argument in zip(operands, sources, arguments, strict=True):
        if known is None:
            raise Unpackable("an operand is no single tensor")
        if known.batch_dim is None:
            dims.append(None if argument in call.varying else -1)
        elif subscripts[known.batch_dim] != letter:
            raise Unpackable("its operands hold the batch in different dims")
        else:
            dims.append(known.batch_dim)
    if None not in dims:
        return Direct(call.node.target)
    return EinsumOfBranches(sources, target, dims, result.batch_dim)


class PackedSelfAttention(nn.Module):
    """`nn.MultiheadAttention` of tokens to themselves, with each branch's own projections.

    Args:
        module: the base architecture's attention, for its options.
        storage: holds its packed tensors.
        branches: how many branches the storage holds.
    """

    def __init__(self, module: nn.MultiheadAttention, storage: nn.Module, branches: int) -> None:
        super().__init__()
        self.heads, self.dropout = module.num_heads, module.dropout
        self.storage, self.branches = storage, branches

    def forward(self, span: Span, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """`[G*N, T, C] -> [G*N, T, C]`."""
        storage: Any = self.storage
        images, tokens, channels = query.shape

        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else narrow(tensor, self.branches, span)

        weight, bias = own(storage.in_proj_weight), own(storage.in_proj_bias)
        assert weight is not None
        parts = linear(query, weight, bias, span.size).view(images, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if storage.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).reshape(images, tokens, channels)
        weight, bias = own(storage.out_proj.weight), own(storage.out_proj.bias)
        assert weight is not None
        return linear(mixed, weight, bias, span.size), None


@batch_rule(nn.MultiheadAttention, first=True)
def run_self_attention(call: Call) -> PackedSelfAttention:
    """Self-attention without masks that returns no attention weights."""
    module: Any = call.module
    known = call.batch_facts()
    if known.batch_dim != 0 or len(known.shape) != 3 or not module.batch_first:
        raise Unpackable("its input does not begin with the batch")
    inputs = {call.argument(position, name) for position, name in enumerate(_SELF)}
    masks = [call.argument(3, "key_padding_mask"), call.argument(5, "attn_mask")]
    if len(inputs) != 1 or any(mask is not None for mask in masks):
        raise Unpackable("it attends to other tokens, or with a mask")
    if call.argument(4, "need_weights", True) or call.node.kwargs.get("is_causal"):
        raise Unpackable("its attention weights are asked for")
    plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    if not plain:
        raise Unpackable("it has projections of several sizes, or biases of its own")
    return PackedSelfAttention(module, call.packed_module, call.branches)


_SELF = ("query", "key", "value")
