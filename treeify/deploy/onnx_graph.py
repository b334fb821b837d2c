"""Steps as ONNX models: every level's call is translated once and put in wherever it is called.

A level of many branches run one by one is one branch's graph, many times, with other weights:
translating them all would take minutes.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, fx

from treeify.deploy.dense import exported
from treeify.deploy.dense_steps import StepPlans, key_of
from treeify.deploy.formats import OPSET
from treeify.deploy.products import write_products
from treeify.deploy.step import Key, Step, item
from treeify.deploy.values import BatchDim, join_branches, slice_branches
from treeify.errors import ExportError

_IR_VERSION = 8  # the format of that opset's time
_BATCH = "batch"


@dataclass
class Translator:
    """Translates steps; the graphs of levels are kept for the next one.

    Args:
        plans: where the steps come from.
    """

    plans: StepPlans
    _graphs: dict[Key, ir.Graph] = field(default_factory=dict)

    def model(self, step: Step, products: Mapping[str, bool] | None = None) -> ir.Model:
        """A step as a model of its own.

        Args:
            step: the step.
            products: per call of a level, whether 1x1 convolutions of several branches are written
                as products.
        """
        writer = _Writer(self, step, products or {})
        return writer.run()

    def graph(self, key: Key, *, products: bool) -> ir.Graph:
        """A copy of a level's call; its weights are those of the call it was translated from."""
        if key not in self._graphs:
            self._graphs[key] = self._translate(key)
        graph = self._graphs[key].clone()
        if products:
            write_products(graph)
        return graph

    def _translate(self, key: Key) -> ir.Graph:
        call = self.plans.level_call(key)
        dense = self.plans.dense(*key)
        dynamic = self.plans.dynamic
        program = exported(
            lambda: fx.GraphModule(dense, dense.graph),
            *(call.examples(), call.batch_dims()),
            dynamic=dynamic,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own exporter, about itself
            try:
                onnx: Any = torch.onnx.export(
                    program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False
                )
            except torch.onnx.OnnxExporterError as error:
                raise _untranslated(error) from error
        _simplify(onnx.model)
        graph: ir.Graph = onnx.model.graph
        return graph


@dataclass
class _Writer:
    translator: Translator
    step: Step
    products: Mapping[str, bool]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)

    def run(self) -> ir.Model:
        step = self.step
        inputs: list[ir.Value] = []
        for node in step.run.graph.nodes:
            if node.op == "placeholder":
                index = len(inputs)
                value = _value(step.inputs[index], step.examples[index], step.batch_dims[index])
                inputs.append(value)
                self.values[node] = value
            elif node.op == "call_module":
                self.values[node] = self._call(node)
            elif node.op == "call_function":
                self.values[node] = self._function(node)
            else:
                outputs = self._outputs(node.args[0])
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": OPSET},
            name=f"leaves_{step.start}_to_{step.leaves}",
        )
        return ir.Model(
            graph,
            ir_version=_IR_VERSION,
            producer_name="treeify",
            producer_version=version("treeify"),
        )

    def _outputs(self, nodes: Sequence[fx.Node]) -> list[ir.Value]:
        """The results under the step's names."""
        outputs: list[ir.Value] = []
        for name, node in zip(self.step.outputs, nodes, strict=True):
            source = self.values[node]
            if source.producer() is not None and source not in outputs:
                source.name = name
                outputs.append(source)
                continue
            # An input, a weight or a result that has a name: a copy, as the format demands.
            output = ir.Value(name=name, shape=source.shape, type=source.type)
            self.nodes.append(ir.node("Identity", [source], outputs=[output]))
            outputs.append(output)
        return outputs

    def _call(self, node: fx.Node) -> list[ir.Value]:
        """Put in the graph of a level's call, with this call's weights."""
        target = str(node.target)
        key = key_of(*self.step.calls[target])
        graph = self.translator.graph(key, products=self.products.get(target, False))
        dense = self.step.run.get_submodule(target)
        arguments = [self.values[argument] for argument in node.args]  # type: ignore[index]
        for place, value in zip(graph.inputs, arguments, strict=True):
            ir.convenience.replace_all_uses_with(place, value, replace_graph_outputs=True)
        for name, place in graph.initializers.items():
            if not place.uses():
                continue
            weight = getattr(dense, name.split(SUFFIX)[0], None)
            fresh = ir.Value(name=f"{target}.{name}", shape=place.shape, type=place.type)
            fresh.const_value = place.const_value
            if weight is not None and place.const_value is not None:
                fresh.const_value = ir.tensor(
                    weight.numpy().reshape(tuple(place.shape or ())), name=fresh.name
                )
            ir.convenience.replace_all_uses_with(place, fresh, replace_graph_outputs=True)
            self.initializers.append(fresh)
        outputs = list(graph.outputs)
        graph.outputs.clear()  # they may become those of the step
        for inner in list(graph):
            graph.remove(inner)
            for value in inner.outputs:
                value.name = f"{target}.{value.name}"
            inner.name = f"{target}.{inner.name}"
            inner.metadata_props.clear()  # where in torch it came from, a tenth of a small file
            self.nodes.append(inner)
        return outputs

    def _function(self, node: fx.Node) -> Any:
        """What a step does between calls: items, slices and joins."""
        args: Any = fx.node.map_arg(node.args, lambda argument: self.values[argument])
        if node.target is item:
            return args[0][args[1]]
        if node.target is join_branches:
            return self._add("Concat", list(args[0]), axis=args[1])
        assert node.target is slice_branches
        x, dim, count, start, size = args
        if isinstance(x.shape[dim], int):
            width = x.shape[dim] // count
            ends = (start * width, (start + size) * width)
            return self._add("Slice", [x, *(self._numbers([each]) for each in (*ends, dim))])
        # Each branch's rows are as many as there are images: only the runtime knows where they end.
        shape = [each if isinstance(each, int) else -1 for each in x.shape]
        apart = self._add("Reshape", [x, self._numbers([*shape[:dim], count, *shape[dim:]])])
        some = [self._numbers([each]) for each in (start, start + size, dim)]
        return self._add("Reshape", [self._add("Slice", [apart, *some]), self._numbers(shape)])

    def _add(self, operation: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        made = ir.node(operation, inputs, attributes)
        (value,) = made.outputs
        value.name = f"between_{len(self.nodes)}"
        value.type, value.shape = inputs[0].type, None
        self.nodes.append(made)
        return value

    def _numbers(self, numbers: list[int]) -> ir.Value:
        name = f"numbers_{len(self.initializers)}"
        array = np.array(numbers, dtype=np.int64)
        kind = ir.TensorType(ir.DataType.INT64)
        value = ir.Value(name=name, type=kind, shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, name=name)
        self.initializers.append(value)
        return value


# Follows the name of a weight that was written in another order (`products`).
SUFFIX = "~"


def _simplify(model: ir.Model) -> None:
    """Fold constants, as the bounds of clipping, which runtimes only then fuse into convolutions.

    Weights are inputs meanwhile, so that none is folded: other branches have others.
    """
    graph = model.graph
    weights = dict(graph.initializers)
    contents = {name: value.const_value for name, value in weights.items()}
    for name, value in weights.items():
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize_ir(model)
    for name, value in weights.items():
        graph.inputs.remove(value)
        value.const_value = contents[name]
        graph.register_initializer(value)


def _untranslated(error: BaseException) -> ExportError:
    """What an operation that has no translation is told as: the first of the errors it led to."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    node = re.search(r"when translating node (%\S+ .*?target=)?([\w.]+)", text)
    return ExportError(
        "an operation of the model cannot be written as ONNX.",
        expected="operations that ONNX has, or that are made of such",
        found=f"{node[2]}: {error!s:.500}" if node else f"{error!s:.500}",
        next_step="Replace the operation in the model's code, or report the model's name.",
    )


def _value(name: str, example: Tensor, batch_dim: BatchDim) -> ir.Value:
    """An input of a step."""
    shape: list[int | str] = list(example.shape)
    if batch_dim is not None:
        dim, times = batch_dim
        shape[dim] = _BATCH if times == 1 else f"{times}*{_BATCH}"
    kind = ir.DataType.from_numpy(example.numpy().dtype)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
