"""How each level of a step runs in ONNX Runtime, chosen by measuring it there.

Which way is faster depends on the processor, the sizes and the runtime, so that what `tune` found
for PyTorch says nothing here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from treeify.deploy.onnx_graph import Translator
from treeify.deploy.quantised_graph import (
    batched_weights,
    fold_transposes,
    has_vnni,
    last_products,
    name_nodes,
    quantise_graph,
)
from treeify.deploy.step import Step
from treeify.engine import timing
from treeify.engine.program import LOOPED, PACKED
from treeify.tree import Span

GROUPED, PRODUCT = "grouped", "product"
# Another form than the grouped one has to win by this much: times are noisy.
_GAIN = 0.97
_BATCHES = (1, 8, 32)
_ROUNDS, _SECONDS = 15, 0.6
_CPU = torch.device("cpu")
# A level that takes so long is not measured with more images than that.
_LONG = 0.05


@dataclass
class Forms:
    """Chooses forms, each level and span once.

    Args:
        translator: of the steps.
        threads: of the runtime while measuring.
        measure: whether to; else every level is grouped.
        quantised: whether files will be in 8 bits. Then no level has batched products, which would
            stay in float: those of linear layers run branch by branch.
    """

    translator: Translator
    threads: int = 1
    measure: bool = True
    quantised: bool = False
    chosen: dict[tuple[int, Span], str] = field(default_factory=dict)
    seconds: dict[tuple[int, Span], dict[str, list[float]]] = field(default_factory=dict)

    def choose(self, level: int, span: Span) -> str:
        """Packed or looped, for `StepPlans.steps`."""
        return LOOPED if self.form(level, span) == LOOPED else PACKED

    def form(self, level: int, span: Span) -> str:
        """Grouped, product or looped."""
        if span.size == 1:
            return GROUPED
        key = (level, span)
        if key not in self.chosen:
            self.chosen[key] = self._choice(level, span)
        return self.chosen[key]

    def _choice(self, level: int, span: Span) -> str:
        if self.quantised and self._multiplies_batches(level, span):
            return LOOPED
        return self._fastest(level, span) if self.measure else GROUPED

    def _multiplies_batches(self, level: int, span: Span) -> bool:
        """Whether a packed level has products that would stay in float, but for its answers'."""
        step = self.translator.plans.level_step(level, span, PACKED)
        graph = ir.to_proto(self.translator.model(step)).graph
        answers = step.outputs[: len(step.outputs) - len(step.kept)]
        fold_transposes(graph)
        name_nodes(graph)
        return bool(batched_weights(graph) - last_products(graph, answers))

    def products(self, step: Step) -> dict[str, bool]:
        """Which calls of a step are written with products."""
        return {
            target: self.form(level, span) == PRODUCT
            for target, (level, span) in step.calls.items()
        }

    def described(self, step: Step) -> dict[str, str]:
        """How each level of a step runs, by its name."""
        return {f"level {level}": self.form(level, span) for level, span in self._spans(step)}

    def _spans(self, step: Step) -> list[tuple[int, Span]]:
        """The levels of a step with all branches that it computes there."""
        spans: dict[int, Span] = {}
        for level, span in step.calls.values():
            before = spans.get(level, span)
            spans[level] = Span(min(before.start, span.start), max(before.stop, span.stop))
        return list(spans.items())

    def _fastest(self, level: int, span: Span) -> str:
        """Measure the forms in turns."""
        plans = self.translator.plans
        packed = plans.level_step(level, span, PACKED)
        looped = plans.level_step(level, span, LOOPED)
        (target,) = packed.calls
        models = {
            GROUPED: self.translator.model(packed),
            PRODUCT: self.translator.model(packed, {target: True}),
            LOOPED: self.translator.model(looped),
        }
        if self.quantised or not any(node.op_type == "Conv" for node in models[GROUPED].graph):
            del models[PRODUCT]  # in float it is the same
        sessions = {
            name: session(self._proto(model, looped if name == LOOPED else packed), self.threads)
            for name, model in models.items()
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        for batch in _BATCHES if plans.dynamic else (plans.images,):
            feeds = _feeds(packed, batch)
            runs = {name: _runner(each, feeds) for name, each in sessions.items()}
            measured = timing.medians(
                timing.alternate(runs, _CPU, repeats=_ROUNDS, budget=_SECONDS)
            )
            for name, seconds in measured.items():
                times[name].append(seconds)
            if min(measured.values()) > _LONG:
                break
        self.seconds[level, span] = times
        scores = {name: prod(seconds) ** (1 / len(seconds)) for name, seconds in times.items()}
        best = min(scores, key=scores.__getitem__)
        return best if scores[best] < _GAIN * scores[GROUPED] else GROUPED

    def _proto(self, model: ir.Model, step: Step) -> onnx.ModelProto:
        """A level as it will run; in 8 bits the ranges of random images do to measure time."""
        proto = ir.to_proto(model)
        if not self.quantised:
            return proto
        answers = step.outputs[: len(step.outputs) - len(step.kept)]
        feeds = [_feeds(step, self.translator.plans.images)]
        return quantise_graph(proto, feeds, answers, reduced_range=not has_vnni())


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """A model in the runtime, as `Anytime` runs it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _feeds(step: Step, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    feeds = {}
    for name, example, dim in zip(step.inputs, step.examples, step.batch_dims, strict=True):
        shape = list(example.shape)
        if dim is not None:
            shape[dim[0]] = dim[1] * batch
        floating = example.is_floating_point()
        values = torch.rand(shape, generator=generator) if floating else torch.zeros(shape)
        feeds[name] = values.to(example.dtype).numpy()
    return feeds


def _runner(session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> Callable[[], Any]:
    names = {each.name for each in session.get_inputs()}
    binding = session.io_binding()
    for name, array in feeds.items():
        if name in names:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)
