"""Batch norms over the images of two processes."""

from pathlib import Path

import norms
import runs
import torch
from torch.testing import assert_close


def test_batch_norms_of_uneven_parts_equal_one_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(norms.norm_a_part, (runs.free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x, weight, bias, mean, var = norms.images_and_norm()
    x.requires_grad_()
    out = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
    (out * out.detach().cos()).sum().backward()
    assert_close(torch.cat([first["out"], second["out"]]), out.detach())
    assert_close(torch.cat([first["grad"], second["grad"]]), x.grad)
    for name, gradient in (("weight", weight.grad), ("bias", bias.grad)):
        assert_close(first[name] + second[name], gradient)
    for tensors in (first, second):
        assert_close(tensors["mean"], mean)
        assert_close(tensors["var"], var)
