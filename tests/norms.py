"""A batch norm over images of two processes, in a file that spawned processes can import."""

import os
from pathlib import Path

import torch

from treeify.training.sync_batch_norm import synced_batch_norm


def norm_a_part(rank: int, port: int, results: Path) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    x, weight, bias, mean, var = images_and_norm()
    part = (x[:3] if rank == 0 else x[3:]).clone().requires_grad_()
    out = synced_batch_norm(part, mean, var, weight, bias, training=True, momentum=0.3)
    (out * out.detach().cos()).sum().backward()
    tensors = {"out": out.detach(), "grad": part.grad, "mean": mean, "var": var}
    tensors |= {"weight": weight.grad, "bias": bias.grad}
    torch.save(tensors, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def images_and_norm() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 3, 4, dtype=torch.float64, generator=generator) * 2 + 5
    weight, bias, mean = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    var = torch.rand(6, dtype=torch.float64, generator=generator) + 0.5
    return x, weight.requires_grad_(), bias.requires_grad_(), mean, var
