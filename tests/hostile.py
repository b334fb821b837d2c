"""Directories that try to run, read or fetch something as they are loaded; and who loads them.

Run as a script, it loads every directory that `write` made in a folder, in one process that notes
what Python does meanwhile, and prints it as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from runner import run
from safetensors.torch import load_file, save_file

import treeify
from treeify.conversion import checksums
from treeify.errors import TreeifyError
from treeify.training.objective import load_teacher
from treeify.training.recipe import TeacherRecipe

NAME = "test_resnet"  # timm's smallest
PAPER = "treeify.models:cifar_resnet50"
PAPER_ARGUMENTS = {"num_classes": 3, "width": 0.25, "layers": [1, 1, 1, 1]}
SPLITS = ["layer3:2"]
MARKER = "touched"
# What a module and a pickle do when they are read as code.
MODULE = f"open({MARKER!r}, 'w').close()\ndef build(**_): open({MARKER!r}, 'w').close()\n"

# Architectures by what they try: never built, whatever else holds.
REFUSED: dict[str, Any] = {
    "shell": ("os:system", {"command": f"touch {MARKER}"}),
    "rmtree": ("shutil:rmtree", {"path": "victim"}),
    "process": ("subprocess:run", {"args": ["touch", MARKER]}),
    "exec": ("builtins:exec", {"source": MODULE}),
    "module beside the user": ("evil:build", {}),
    "old name of a module": ("treeify.shallower:build", {"model": "evil:build", "blocks": 1}),
    "model in a model": (
        "treeify.models.shallow:build",
        {"model": "os:system", "blocks": 1, "command": f"touch {MARKER}"},
    ),
    "way through treeify": ("treeify.models:cifar_resnet.nn.Module", {}),
    "treeify's importer": ("treeify.registry:import_function", {"name": "evil:build"}),
    "pickle": ("torch:load", {"f": "evil.pth", "weights_only": False}),
    "hub of code": ("torch.hub:load", {"repo_or_dir": ".", "source": "local", "model": "build"}),
    "timm's factory": (
        "timm:create_model",
        {"model_name": NAME, "pretrained": True, "pretrained_cfg": {"url": "http://127.0.0.1:9/"}},
    ),
    "hub": ("hf-hub:somebody/something", {}),
    "hub of timm": ("timm/hf-hub:somebody/something", {}),
    "folder": ("local-dir:victim", {}),
    "path": ("victim/config.json", {}),
    "torchvision's path": ("torchvision/../evil", {}),
    "no name": ("", {}),
    "endless name": ("resnet" * 10**5, {}),
    "number": (7, {}),
    "arguments in a list": (NAME, [1]),
    "second name": (NAME, {"model_name": "hf-hub:somebody/something"}),
    "classes without end": (NAME, {"num_classes": 10**12}),
    "classes beyond memory": (NAME, {"num_classes": 2 * 10**8}),
    "width without end": (PAPER, {**PAPER_ARGUMENTS, "width": 10**6}),
    "layers without end": (PAPER, {**PAPER_ARGUMENTS, "layers": [10**9, 1, 1, 1]}),
    "positions without end": ("test_vit", {"img_size": 10**6, "num_classes": 3}),
    "deep arguments": (NAME, {"a": json.loads("[" * 500 + "]" * 500)}),
}
# Arguments that would read weights: dropped, and the rest of the architecture is what it was.
DROPPED: dict[str, dict[str, Any]] = {
    "address": {"pretrained": True, "pretrained_cfg": {"url": "http://127.0.0.1:9/"}},
    "address without asking": {"pretrained_cfg": {"url": "http://127.0.0.1:9/", "tag": "x"}},
    "file": {"pretrained": True, "pretrained_cfg": {"file": "evil.pth", "num_classes": 3}},
    "hub's file": {"pretrained": True, "pretrained_cfg": {"hf_hub_id": "a/b", "source": "hf-hub"}},
    "checkpoint": {"checkpoint_path": "evil.pth"},
    "overlay": {"pretrained": True, "pretrained_cfg_overlay": {"file": "evil.pth"}},
    "cache": {"pretrained": True, "cache_dir": "cache"},
}
# Other keys of the configuration.
CONFIGS: dict[str, dict[str, Any]] = {
    "fanout without end": {"splits": ["layer3:1000000000000"]},
    "fanout of digits": {"splits": ["layer3:" + "9" * 5000]},
    "a million splits": {"splits": ["layer3:2"] * 10**6},
    "image without end": {"example": [3, 10**9, 10**9]},
    "batch without end": {"batch": 10**12},
    "no image": {"example": [3, -1, "x"]},
    "versions in a list": {"versions": ["torch"]},
    "frozen by number": {"frozen": 3},
    "large pictures": {"preparation": {"size": [10**6, 10**6]}},
}


class _Evil:
    def __reduce__(self) -> Any:
        return exec, (MODULE,)


def unseal(directory: Path) -> None:
    """Write a saved ensemble as earlier versions did, without checksums: whoever likes, may."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    weights, *_ = config.pop(checksums.FILES)
    config.pop(checksums.SEAL)
    file.write_text(json.dumps(config))
    (directory / weights).rename(directory / "model.safetensors")


def _changed(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _tensors(directory: Path, **changes: Any) -> None:
    """Add tensors to a directory's, or put others in their place."""
    file = directory / "model.safetensors"
    identity = json.loads((directory / "config.json").read_text())["identity"]
    save_file({**load_file(file), **changes}, file, metadata={"identity": identity})


def _linked(directory: Path, name: str, target: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(target)


def _changes(folder: Path) -> dict[str, Callable[[Path], None]]:
    """What makes a copy of a harmless ensemble hostile, by the copy's name."""

    def architecture(name: Any, kwargs: Any) -> Callable[[Path], None]:
        return lambda path: _changed(path, architecture={"name": name, "kwargs": kwargs})

    def damage(name: str, content: str) -> Callable[[Path], None]:
        return lambda path: (path / name).write_text(content) and None

    def sparse(path: Path) -> None:
        os.truncate(path / "model.safetensors", 10**13)

    def pipe(name: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            (path / name).unlink()
            os.mkfifo(path / name)

        return make

    def link(name: str, target: Path) -> Callable[[Path], None]:
        return lambda path: _linked(path, name, target)

    def tensors(**changes: Any) -> Callable[[Path], None]:
        return lambda path: _tensors(path, **changes)

    one = torch.zeros(3)
    return {
        **{name: architecture(*values) for name, values in REFUSED.items()},
        **{
            name: architecture(NAME, {"num_classes": 3, **kwargs})
            for name, kwargs in DROPPED.items()
        },
        **{
            name: (lambda path, c=changes: _changed(path, **c)) for name, changes in CONFIGS.items()
        },
        "deep configuration": damage("config.json", "[" * 10**5),
        "number without end": damage("config.json", "1" * 10**5),
        "configuration elsewhere": link("config.json", folder / "victim/config.json"),
        "weights elsewhere": link("model.safetensors", folder / "victim/model.safetensors"),
        "link to itself": link("config.json", Path("config.json")),
        "configuration in a pipe": pipe("config.json"),
        "weights in a pipe": pipe("model.safetensors"),
        "weights with holes": sparse,
        "weights in a pickle": lambda path: (
            shutil.copy(folder / "evil.pth", path / "model.safetensors") and None
        ),
        "method by name": tensors(**{"constant forward": one}),
        "class by name": tensors(**{"constant layer1.__class__": one}),
        "parameters by name": tensors(**{"constant _parameters": one}),
        "tensor of another kind": tensors(**{"fc.bias": torch.zeros(6, dtype=torch.int32)}),
    }


def _recipes(folder: Path, text: str) -> dict[str, str]:
    """Recipes of hostile runs by their names, from that of a harmless one."""
    model = yaml.safe_load(text)["model"]
    recipes: dict[str, dict[str, Any]] = {
        "run data": {"data": {"name": "evil:build"}},
        "run loss": {"loss": {"name": "evil:build"}},
        "run extending": {"extends": "../victim/config.json"},
        "run weights": {"model": {**model, "weights": str(folder / "evil.pth")}},
        "run download": {"data": {"name": "cifar10", "download": True, "root": "run download"}},
        "run hub": {"data": {"name": "timm", "dataset": "hfds/somebody"}},
        "run teacher": {"teacher": {"name": "victim", "trust": True}},
    }
    few = {"data": {"name": "digits", "held_out": 20, "size": 8}}
    contents = {
        name: yaml.safe_dump({**yaml.safe_load(text), **few, **changes})
        for name, changes in recipes.items()
    }
    contents["run tags"] = f"{text}note: !!python/object/apply:os.system ['touch {MARKER}']\n"
    return contents


def write(folder: Path, ensemble: Path, saved_run: Path) -> list[str]:
    """Write every directory, by changes to an ensemble and to a run, both harmless.

    Returns:
        Their names; those of runs begin with `run`.
    """
    (folder / "evil.py").write_text(MODULE)
    (folder / "evil.pth").write_bytes(pickle.dumps(_Evil()))
    shutil.copytree(ensemble, folder / "victim")
    makers = _changes(folder)
    contents = _recipes(folder, (saved_run / "recipe.yaml").read_text())
    for name, make in makers.items():
        shutil.copytree(ensemble, folder / name)
        make(folder / name)
    for name, content in contents.items():
        shutil.copytree(saved_run, folder / name, symlinks=True)
        (folder / name / "recipe.yaml").write_text(content)
    shutil.copytree(saved_run, folder / "run last elsewhere", symlinks=True)
    _linked(folder / "run last elsewhere", "last", folder / "victim")
    shutil.copytree(saved_run, folder / "run recipe elsewhere", symlinks=True)
    shutil.copy(saved_run / "recipe.yaml", folder / "elsewhere.yaml")
    _linked(folder / "run recipe elsewhere", "recipe.yaml", folder / "elsewhere.yaml")
    return [*makers, *contents, "run last elsewhere", "run recipe elsewhere"]


# What must not happen while somebody's directory is read.
_FORBIDDEN = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("shutil.", "pickle.find_class", "ctypes.dlopen", "webbrowser.", "urllib.", "http.", "glob."),
)


class Watch:
    """Notes what Python does, by its audit events, while a directory is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.directory = folder.resolve(), folder
        self.active = False
        self.events: list[str] = []
        # Modules that are imported late, and what the system says about itself.
        places = (sys.prefix, sys.base_prefix, *sys.path, "/proc", "/sys", "/dev/null", "/usr")
        self.harmless = tuple(str(Path(place).resolve()) for place in places if place)
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event.startswith(_FORBIDDEN):
            self.events.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            inside = path.startswith(f"{self.directory}{os.sep}")
            if not inside and not path.startswith(self.harmless):
                self.events.append(f"open {path} {args[1]}")
        elif event == "import" and str(args[0]).partition(".")[0] == "evil":
            self.events.append(f"import {args[0]}")

    @contextlib.contextmanager
    def loading(self, directory: Path) -> Iterator[list[str]]:
        self.directory, self.events = directory.resolve(), []
        self.active = True
        try:
            yield self.events
        finally:
            self.active = False


def _loaders(image: str) -> dict[str, Callable[[str], None]]:
    """The ways to give treeify a directory."""

    def command(*arguments: str) -> Callable[[str], None]:
        def invoke(name: str) -> None:
            result = run(arguments[0], name, *arguments[1:])
            if result.exit_code:
                # An error that is no answer is one of ours.
                raise RuntimeError(f"exit {result.exit_code}: {result.output}")

        return invoke

    return {
        "load": lambda name: treeify.load(name) and None,
        "predict": command("predict", image),
        "eval": lambda name: command(
            "eval", "--no-latency", *([] if name.startswith("run") else ["--data", "name=digits"])
        )(name),
        "calibrate": command("calibrate", "--no-tune", "--repeats", "10"),
        "weights": lambda name: treeify.hierarchicalize(NAME, ["layer3"], weights=name) and None,
        "teacher": lambda name: (
            load_teacher(TeacherRecipe(name=name), torch.float32, torch.device("cpu")) and None
        ),
    }


def main(folder: Path, names: list[str], image: str, ways: list[str]) -> None:
    """Load every directory and print what came of it."""
    os.chdir(folder)
    loaders = _loaders(image)
    report = []
    watch = Watch(folder)
    # Once unwatched: what is imported late is there then.
    for way in ways:
        with contextlib.suppress(Exception):
            loaders[way]("victim")
    for name in names:
        # In every way where the model is chosen; a run by those who read its recipe.
        chosen = ways if name == "shell" else ["eval"] if name.startswith("run") else ["load"]
        for way in chosen:
            begin = time.monotonic()
            outcome, message = "loaded", ""
            with watch.loading(folder / name) as events:
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        loaders[way](name)
                except TreeifyError as error:
                    outcome, message = "refused", str(error)
                except RuntimeError as error:
                    message = str(error)
                    outcome = "refused" if message.startswith("exit 2: ") else "crashed"
                except Exception as error:  # a raw one, which nobody should see
                    outcome, message = "crashed", f"{type(error).__name__}: {error}"
            report.append(
                {
                    "name": name,
                    "way": way,
                    "outcome": outcome,
                    "message": message[:2000],
                    "events": events,
                    "seconds": time.monotonic() - begin,
                }
            )
    # Not ru_maxrss, which a process has from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
    print(json.dumps({"report": report, "peak": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
