"""Names and numbers of the exported format, which the runtime knows by itself."""

MANIFEST, RUNTIME, README = "ensemble.json", "anytime.py", "README.md"
FORMAT, VERSION = "treeify-export", 1
# The first whose Split can be told a number of parts; every runtime in use reads it.
OPSET = 18
# What writing one needs besides treeify's own packages.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
