"""Where do exported ensembles lose against their base models? Layer by layer, in ONNX Runtime.

    python benchmarks/deploy_layers.py [--only NAME ...]

A late layer has small maps and many weights, and takes longer per multiply-accumulate than an early
one, in the base model too; an ensemble has more of the late ones. For the layers whose outputs have
the same height and width this prints milliseconds per 10^9 multiply-accumulates in the base model
and in one call of the ensemble, one thread. `E_layers` is the time of a call in which every layer
is as fast as those of the base model, over the time of the call; `E` of `deploy.py` is less than
`E_layers` where late layers are slow. Last come convolutions that read their weights from memory,
as in one call for one image, from the cache, and as a matrix product of unfolded patches.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import onnxruntime
import torch
from deploy import NAMES, base_graph
from onnx import TensorProto, helper, numpy_helper

from treeify.deploy import export
from treeify.engine import timing

_ROUNDS, _CPU = 15, torch.device("cpu")
Buckets = Mapping[int, tuple[float, float]]  # by height and width: milliseconds, 10^9 MACs


def session(model: bytes | str, **options: Any) -> onnxruntime.InferenceSession:
    """A model with one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def buckets(profile: Path) -> Buckets:
    """What convolutions and linear layers take, by the pixels of their outputs."""
    times: dict[str, list[float]] = defaultdict(list)
    layers: dict[str, tuple[int, float]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        if facts["op_name"] not in ("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul"):
            continue
        shapes = [next(iter(each.values())) for each in facts["input_type_shape"]]
        output = next(iter(facts["output_type_shape"][0].values()))
        if "Conv" in facts["op_name"]:
            pixels, inner = prod(output[2:]), prod(shapes[1][1:])
        else:  # [branches, outputs, channels] by [images, branches, channels, pixels], or linear
            pixels, inner = output[3] if len(output) == 4 else 1, shapes[0][-1]
        layers[event["name"]] = pixels, prod(output) * inner / 1e9
        times[event["name"]].append(event["dur"] / 1e3)
    sums: dict[int, tuple[float, float]] = {}
    for name, (pixels, macs) in layers.items():
        milliseconds, before = sums.get(pixels, (0.0, 0.0))
        sums[pixels] = milliseconds + median(times[name]), before + macs
    return sums


def compare(case: common.Case, batch: int, folder: Path) -> None:
    """Print one network's layers."""
    x = np.random.default_rng(0).normal(size=(batch, 3, case.size, case.size)).astype(np.float32)
    sessions = {
        name: session(str(file), enable_profiling=True, profile_file_prefix=str(folder / name))
        for name, file in {
            "base": folder / "base.onnx",
            "call": folder / "call" / "step-01.onnx",
        }.items()
    }
    actions: dict[str, Callable[[], Any]] = {
        name: lambda each=each: each.run(None, {each.get_inputs()[0].name: x})  # type: ignore[misc]
        for name, each in sessions.items()
    }
    timing.alternate(actions, _CPU, repeats=_ROUNDS)
    base, call = (buckets(Path(each.end_profiling())) for each in sessions.values())
    ideal = sum(macs * base[pixels][0] / base[pixels][1] for pixels, (_, macs) in call.items())
    whole = sum(milliseconds for milliseconds, _ in call.values())
    alone = sum(milliseconds for milliseconds, _ in base.values())
    macs_base, macs_call = (sum(macs for _, macs in each.values()) for each in (base, call))
    e = alone / macs_base * macs_call / whole
    print(f"{case.name}, batch {batch}: E {e:.2f}, E_layers {ideal / whole:.2f}")
    for pixels, (milliseconds, macs) in sorted(call.items(), reverse=True):
        time, own = base[pixels]
        speeds = f"{time / own:6.2f} ms of 10^9 MACs, here {milliseconds / macs:6.2f}"
        parts = f"{own / macs_base:5.1%} of all MACs, here {macs / macs_call:5.1%}"
        print(f"  {pixels:6} pixels: {speeds}; {parts}")


def weights_from_memory(count: int = 24) -> None:
    """Print what a late layer of resnet18 takes for one image, by where its weights are."""
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(512, 512, 3, 3)).astype(np.float32) for _ in range(count)]
    convs = [
        _layer("Conv", (1, 512, 7, 7), (1, 512, 7, 7), weight, pads=[1, 1, 1, 1])
        for weight in weights
    ]
    products = [
        _layer("MatMul", (49, 4608), (49, 512), weight.reshape(512, -1).T.copy())
        for weight in weights
    ]
    times = timing.alternate(
        {
            "weights from memory": lambda: [each() for each in convs],
            "weights from the cache": lambda: [convs[0]() for _ in convs],
            "matrix product, without unfolding": lambda: [each() for each in products],
        },
        _CPU,
        repeats=_ROUNDS,
    )
    for name, seconds in times.items():
        low, middle, high = (
            1e3 * float(np.quantile(seconds, q)) / count for q in (0.25, 0.5, 0.75)
        )
        print(f"512 channels, 3x3, 7x7 pixels, {name}: {middle:.2f} ms ({low:.2f} to {high:.2f})")


def _layer(
    kind: str, inputs: tuple[int, ...], outputs: tuple[int, ...], weight: Any, **attributes: Any
) -> Callable[[], Any]:
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "weight"], ["y"], **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    run = session(model.SerializeToString()).run
    x = np.ones(inputs, np.float32)
    return lambda: run(None, {"x": x})


def main() -> None:
    """Print the layers of the convolutional networks."""
    options = common.arguments(__doc__ or "").parse_args()
    common.prepare()
    for case in (*common.CIFAR, *common.IMAGENET):
        if case.name not in NAMES or not (
            options.only is None or any(word in case.name for word in options.only)
        ):
            continue
        base = case.base()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base_graph(base, case.size, folder / "base.onnx")
            hne = case.ensemble(base)
            export(hne, folder / "call", sizes=[hne.leaves], verify=False)
            for batch in (1, 8):
                compare(case, batch, folder)
    weights_from_memory()


if __name__ == "__main__":
    main()
