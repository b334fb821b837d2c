"""Networks that are compared draw their mean and keep their precision."""

import torch
import torch.nn.functional as F

from treeify.parity.deterministic import FullPrecision, deterministic


def test_in_full_precision_casts_to_float32_are_none() -> None:
    x, single = torch.rand(3, dtype=torch.float64), torch.rand(3)
    with FullPrecision():
        for made in (
            *(x.float(), x.to(torch.float32), x.to("cpu", dtype=torch.float32)),
            *(x.softmax(0, dtype=torch.float32), torch.sum(x, 0, dtype=torch.float32)),
        ):
            assert made.dtype == torch.float64
        assert torch.equal(x.float(), x)
        for made in (single.type_as(x), x.type_as(single), (x > 0).float() @ x, x @ single):
            assert made.dtype == torch.float64
        assert x.half().dtype == torch.float16
        assert single.double().dtype == torch.float64
        assert single.to(torch.float32).dtype == single.float().dtype == torch.float32
        lists = (
            torch.cat([x, single]),
            torch.stack(tensors=[single, x]),
            torch.einsum("i,i", x, single),
        )
        assert {made.dtype for made in lists} == {torch.float64}
    assert x.float().dtype == torch.float32


def test_draws_are_held_in_full_precision() -> None:
    x = torch.rand(3, dtype=torch.float64)
    with deterministic(torch.float64):
        drawn = torch.rand_like(x, dtype=torch.float32)
        assert drawn.dtype == torch.float64 and drawn.eq(0.5).all()
        assert torch.equal(F.dropout(x, 0.5, training=True), x)
        assert x.clone().bernoulli_(0.25).eq(0.25).all()
        own = torch.bernoulli(x).float()
        assert own.dtype == torch.float64 and torch.equal(own, x)
    with deterministic(torch.float32):
        assert torch.rand_like(x, dtype=torch.float32).dtype == torch.float32
