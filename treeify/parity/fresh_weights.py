"""Fresh weights hide mistakes: values that training would give them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from treeify.engine.preserve import preserve_modes
from treeify.parity.deterministic import deterministic


def settle(model: nn.Module) -> None:
    """Give fresh statistics and zero-initialised weights values that matter, as training would.

    A fresh network hides mistakes: running means of 0, variances and scales of 1, and last scales
    of residual branches of 0, under which whole branches vanish from the output. The model is
    changed in place, from torch's random state.
    """
    with torch.no_grad():
        for name, tensor in idle_tensors(model):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            else:
                tensor.add_(torch.empty_like(tensor).uniform_(0.1, 0.3))


def fit_statistics(model: nn.Module, images: Tensor) -> None:
    """Bring running means and variances of batch norms near those of some images.

    With statistics that fit no images the activations of deep networks grow in evaluation mode,
    until the rounding of float64 decides what the network answers. The network or ensemble is
    changed in place, from torch's random state.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # nothing but this batch's statistics
    with preserve_modes(model), torch.no_grad(), deterministic(images.dtype):
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        mean.add_(torch.randn_like(mean).mul_(0.1 * var.sqrt()))
        var.mul_(torch.empty_like(var).uniform_(0.8, 1.25))


def idle_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and running statistics that hide mistakes, by name.

    They have one value throughout; those of a single element, the value 0 or 1.
    """
    statistics = ("running_mean", "running_var")
    tensors = (
        *model.named_parameters(),
        *((name, buffer) for name, buffer in model.named_buffers() if name.endswith(statistics)),
    )
    return [
        (name, tensor)
        for name, tensor in tensors
        if tensor.is_floating_point()
        and tensor.numel()
        and (low := tensor.min()) == tensor.max()
        and (tensor.numel() > 1 or low in (0, 1))
    ]
