"""Export an ensemble, and answer from the files with numpy and onnxruntime alone.

The directory can be copied to where there is no PyTorch: `anytime.py` in it is all that is needed,
and the first step's file is enough for a first answer. Needs `pip install 'treeify[onnx]'`.

python examples/export_and_run.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import treeify
from treeify.deploy import export
from treeify.models import cifar_resnet50

ELSEWHERE = """
import sys
import numpy as np
from anytime import Anytime

model = Anytime(".", threads=1)
images = np.load("images.npy")
for answer in model.anytime(images):
    print(answer.leaves, "leaves:", answer.logits.argmax(-1), f"{answer.elapsed * 1000:.1f} ms")
np.save("logits.npy", answer.logits)
print("PyTorch is imported:", "torch" in sys.modules)
"""


def main() -> None:
    """Export, run the files in a process of their own, and compare."""
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 32)
    hne = treeify.hierarchicalize(
        cifar_resnet50(width=0.25, layers=[1, 1, 1, 1]),  # trained, in your case
        ["block3", "block4"],
        init="fresh",
        example_input=images,
    ).eval()
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent, "exported")
        export(hne, directory, tune=False)
        for file in sorted(directory.iterdir()):
            print(f"{file.name}: {file.stat().st_size:,} bytes")
        np.save(directory / "images.npy", images.numpy())
        subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=directory, check=True)
        logits = np.load(directory / "logits.npy")
    print(f"as in PyTorch: {np.allclose(logits, hne.predict(images).detach(), 1e-4, 1e-5)}")


if __name__ == "__main__":
    main()
