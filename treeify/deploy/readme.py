"""The README of an export: what its files are, and how three languages run them."""

from collections.abc import Mapping
from string import Template
from typing import Any

# In shapes: any number of images, of which the examples have one.
_ANY, _ONE = "batch", 1


def readme(manifest: Mapping[str, Any]) -> str:
    """Markdown about an export, with its own names, sizes and numbers in the examples.

    Args:
        manifest: what `ensemble.json` holds.
    """
    steps, dtype = manifest["steps"], manifest["images"]["dtype"]
    shape = [_ONE if size == _ANY else size for size in manifest["images"]["shape"]]
    # The answer, or its first part: of a structure, `ensemble.json` says where each part belongs.
    (logits, *_) = [out["name"] for out in steps[0]["outputs"] if out["kind"] == "leaves"]
    total = sum(step["bytes"] for step in steps)
    opens = shape[0] == _ONE and _is_known(manifest["preparation"])
    values = {
        "numpy": "" if opens else "import numpy\n",
        "name": manifest["name"],
        "treeify": manifest["versions"]["treeify"],
        "opset": manifest["versions"]["opset"],
        "leaves": manifest["sizes"][-1],
        "table": "\n".join(map(_row, steps)),
        "megabytes": f"{total / 1e6:.2f}",
        "batch": _batch(manifest["images"]["shape"][0]),
        "input": ", ".join(
            "N" if size == _ANY else str(size) for size in manifest["images"]["shape"]
        ),
        "shape": ", ".join(map(str, shape)),
        "cpp_steps": "\n".join(map(_cpp_step, steps)),
        "count": " * ".join(map(str, shape)),
        "dtype": dtype,
        "preparation": _preparation(manifest["preparation"]),
        "classes": _classes(manifest["classes"]),
        "quantised": _quantised(manifest["quantised"]),
        "logits": logits,
        "images": 'model.open("photo.jpg")  # float32 [1, C, H, W]; needs Pillow'
        if opens
        else f"numpy.zeros({tuple(shape)}, dtype={dtype!r})  # your images, prepared",
    }
    return _TEMPLATE.substitute(values)


def _row(step: Mapping[str, Any]) -> str:
    span = f"{step['start']} to {step['leaves']}"
    megabytes, macs = f"{step['bytes'] / 1e6:.2f}", f"{step['macs']:,}"
    return f"| `{step['file']}` | {span} | {megabytes} | {macs} | {step['parameters']:,} |"


def _cpp_step(step: Mapping[str, Any]) -> str:
    inputs, outputs = (
        ", ".join(f'"{value["name"]}"' for value in step[side]) for side in ("inputs", "outputs")
    )
    return f'    {{"{step["file"]}", {{{inputs}}}, {{{outputs}}}}},'


def _batch(images: int | str) -> str:
    if images == _ANY:
        return "Any number of images are answered together."
    return f"Exactly {images} {'image is' if images == 1 else 'images are'} answered together."


def _is_known(preparation: Mapping[str, Any] | None) -> bool:
    return preparation is not None and preparation["mean"] is not None


def _preparation(preparation: Mapping[str, Any] | None) -> str:
    if preparation is None or not _is_known(preparation):
        return (
            "How images were prepared in training is not known: `model.open` refuses files, and"
            " arrays have to be prepared as whoever trained the network did."
        )
    mean, std = (", ".join(f"{x:g}" for x in preparation[key]) for key in ("mean", "std"))
    crop, fraction = preparation["crop_mode"], preparation["crop_pct"]
    height, width = preparation["size"]
    return (
        f"Images are {height} pixels high and {width} wide, with {preparation['channels']}"
        f" channels; resized with {preparation['interpolation']} interpolation (crop mode {crop},"
        f" {fraction:.4g} of the sides kept).\nPixels in 0 to 1 less {mean}, divided by {std}."
        " `model.open` does all of it, bit for bit as in evaluation."
    )


def _classes(classes: list[str] | None) -> str:
    if classes is None:
        return "The names of the classes are not known."
    return f"`ensemble.json` names the {len(classes):,} classes, in the order of the logits."


def _quantised(quantised: Mapping[str, Any] | None) -> str:
    if quantised is None:
        return ""
    return f"\nThe files are quantised to 8 bits: {quantised['scheme']}.\n"


_TEMPLATE = Template("""\
# $name

An ensemble of $leaves leaves that answers at once, and better with every further step. Written by
treeify $treeify; running it needs neither treeify nor PyTorch.

| file | leaves | MB | MACs per image | parameters |
|---|---|---:|---:|---:|
$table

Each step computes only the leaves that the steps before it have not, from values that those kept:
the files share no weights, and are $megabytes MB together. Stop after any of them: the answer is
the mean of the logits so far. $batch
Input `images`: $dtype, [$input]. ONNX, opset $opset.
$quantised
$preparation
$classes

`ensemble.json` has all of this for programs: per step the inputs (`images`, or values that earlier
steps kept), the outputs (`$logits`: of the new leaves, [N, new leaves, K]; all others: values
to keep), MACs, parameters and checksums.

## Python

`pip install numpy onnxruntime`, and `pillow` to open files of images. `anytime.py` is all there is
to the runtime.

```python
${numpy}from anytime import Anytime

model = Anytime(".", threads=2)  # the directory with ensemble.json
images = $images
for step in model.anytime(images):
    print(step.leaves, step.logits.argmax(-1), f"{1e3 * step.elapsed:.1f} ms")
model.calibrate(images)  # once on each machine: how long every step takes
answer = model.predict(images, deadline=0.02)  # or leaves=..., confidence=..., budget=...
print(answer.leaves, answer.met)
```

## C++

With the headers and the library of ONNX Runtime (`-lonnxruntime`), C++17.

```cpp
#include <cstdio>
#include <map>
#include <string>
#include <vector>
#include <onnxruntime_cxx_api.h>

struct Step { const char* file; std::vector<const char*> inputs, outputs; };
const std::vector<Step> steps{
$cpp_steps
};

int main() {
  Ort::Env env;
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<float> images($count), sum;  // your images, prepared
  const std::vector<int64_t> shape{$shape};
  std::map<std::string, Ort::Value> values;  // the images, and what steps keep for later ones
  values.emplace("images", Ort::Value::CreateTensor<float>(
      memory, images.data(), images.size(), shape.data(), shape.size()));
  int64_t leaves = 0;
  for (const auto& [file, inputs, outputs] : steps) {
    Ort::Session session(env, file, Ort::SessionOptions{});
    Ort::IoBinding io(session);
    for (auto name : inputs) io.BindInput(name, values.at(name));
    for (auto name : outputs) io.BindOutput(name, memory);
    session.Run(Ort::RunOptions{}, io);
    auto results = io.GetOutputValues();
    for (size_t i = 0; i < results.size(); i++)
      values.insert_or_assign(outputs[i], std::move(results[i]));
    // Of the new leaves, [N, new leaves, K]; those of the first image are added up.
    const auto& logits = values.at("$logits");
    const auto dims = logits.GetTensorTypeAndShapeInfo().GetShape();
    sum.resize(dims[2]);
    for (int64_t i = 0; i < dims[1] * dims[2]; i++)
      sum[i % dims[2]] += logits.GetTensorData<float>()[i];
    leaves += dims[1];
    std::printf("%d leaves: logit 0 is %g\\n", int(leaves), sum[0] / leaves);
  }
}
```

## JavaScript

In a browser with `onnxruntime-web`, in Node with `onnxruntime-node`; both are called `ort` below.

```js
const manifest = await (await fetch("ensemble.json")).json();
const values = { images: new ort.Tensor("$dtype", new Float32Array($count), [$shape]) };
const sum = [];
for (const step of manifest.steps) {
  const session = await ort.InferenceSession.create(step.file);
  const feeds = step.inputs.map(({ name }) => [name, values[name]]);
  Object.assign(values, await session.run(Object.fromEntries(feeds)));
  const { data, dims } = values["$logits"]; // of the new leaves, [N, new leaves, K]
  for (let i = 0; i < dims[1] * dims[2]; i++) sum[i % dims[2]] = (sum[i % dims[2]] ?? 0) + data[i];
  console.log(step.leaves, sum.map((logit) => logit / step.leaves));
}
```
""")
