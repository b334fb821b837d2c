"""Answer the frames of a stream one after the other, each within its deadline.

A camera gives a frame every so often; whoever is late loses one. The ensemble knows how long it
takes to get to each size on this machine, so every frame gets as many leaves as fit.

python examples/deadlines.py
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

import treeify
from treeify.models import cifar_resnet50

FRAMES = 40


def camera(seconds: float) -> Iterator[Tensor]:
    """Frames of a stream, `[1, 3, 32, 32]`, one in so many seconds."""
    for _ in range(FRAMES):
        time.sleep(seconds)
        yield torch.rand(1, 3, 32, 32)


def main() -> None:
    """Calibrate, then answer a stream at three deadlines, and count what was late."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads wait for the slowest of them; one keeps deadlines better
    hne = treeify.hierarchicalize(
        cifar_resnet50(width=0.5, layers=[1, 1, 1, 1]),  # trained, in your case
        ["block1", "block2", "block3"],
        init="fresh",
        example_input=torch.rand(1, 3, 32, 32),
    ).eval()
    frame = torch.rand(1, 3, 32, 32)
    hne.tune(frame, budget=1.0)  # the fastest way to run here
    latencies = hne.calibrate(frame)
    print(latencies)
    most = latencies.typical[0, hne.leaves]
    for deadline in (0.3 * most, 2 * most, 20 * most):
        leaves, late = 0, 0
        for frame in camera(0.002):
            answer = hne.predict(frame, deadline=deadline)
            leaves += int(answer.leaves)
            late += not answer.met
        print(
            f"{deadline * 1000:.1f} ms: {leaves / FRAMES:.1f} of {hne.leaves} leaves, {late} late"
        )


if __name__ == "__main__":
    main()
