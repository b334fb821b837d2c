"""Weights go into a model: prefixes and a head for other classes aside, tensor for tensor."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treeify.errors import CheckpointError, joined
from treeify.models.weights import Weights

# What wrappers put anywhere into keys: torch.compile, and two of torch's for large models.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Old checkpoints lack these counts; torch does without them, too.
_COUNT = "num_batches_tracked"


def load_into(model: nn.Module, weights: Weights, num_classes: int | None = None) -> list[str]:
    """Put weights into a model, all of them or none.

    Args:
        model: it is changed in place.
        weights: of the same architecture.
        num_classes: the number of classes that was asked for: a head for another number keeps
            the values it has. Without it every tensor has to fit.

    Returns:
        What a user should know: where the weights come from, what was left out, a fresh head.

    Raises:
        CheckpointError: tensors are missing, of another shape, or unexpected; all are listed, and
            the model is as it was.
    """
    fit = _compare(model, weights, num_classes)
    if fit.problems:
        raise CheckpointError(
            f"the weights of {weights.source} do not fit {type(model).__name__}.",
            expected=f"its {len(fit.expected)} tensors",
            found="\n    ".join(fit.problems),
            next_step=_advice(fit),
        )
    notes = [f"weights: {weights.source}", *_notes(fit)]
    fitting = {key: tensor for key, tensor in fit.state.items() if key not in fit.head}
    model.load_state_dict(fitting, strict=False)
    return notes


@dataclass(frozen=True)
class _Fit:
    """How weights and a model compare; keys are the model's.

    Args:
        expected: the model's tensors.
        state: the weights for them.
        unexpected: weights that the model has no tensor for.
        prefix: before the model's keys in the weights.
        outside: keys of weights without that prefix: a loss's, say, or another network's.
        head: keys whose weights are for other classes, or missing, and may be.
    """

    expected: dict[str, Tensor]
    state: dict[str, Tensor]
    unexpected: list[str]
    prefix: str
    outside: list[str]
    head: frozenset[str]

    @property
    def missing(self) -> list[str]:
        """Keys without weights; of a tied tensor's, one is enough."""
        loaded = {id(self.expected[key]) for key in self.state.keys() | self.head}
        return [
            key
            for key, tensor in self.expected.items()
            if id(tensor) not in loaded and not key.endswith(_COUNT)
        ]

    @property
    def misshapen(self) -> list[str]:
        """Keys whose weights have another shape, where they may not."""
        shapes = ((key, self.state[key].shape != self.expected[key].shape) for key in self.state)
        return [key for key, differs in shapes if differs and key not in self.head]

    @property
    def incomparable(self) -> list[str]:
        """Keys of floats whose weights are none: quantised, say, or sparse."""
        return [
            key
            for key, tensor in self.state.items()
            if self.expected[key].is_floating_point()
            and not (tensor.is_floating_point() and tensor.layout == torch.strided)
        ]

    @property
    def problems(self) -> list[str]:
        """One line for each kind of what does not fit."""
        shapes = [
            f"{key} {list(self.state[key].shape)} instead of {list(self.expected[key].shape)}"
            for key in self.misshapen
        ]
        numbers = [
            f"{key} {self.state[key].dtype} instead of {self.expected[key].dtype}"
            for key in self.incomparable
        ]
        kinds = {
            "missing": self.missing,
            "of another shape": shapes,
            "of other numbers": numbers,
            "unexpected": self.unexpected,
        }
        return [f"{len(keys)} {kind}: {joined(keys)}" for kind, keys in kinds.items() if keys]


def _compare(model: nn.Module, weights: Weights, num_classes: int | None) -> _Fit:
    """Compare a model's state dict with weights."""
    # What a module adds by `get_extra_state` need not be a tensor.
    state_dict = model.state_dict(keep_vars=True)
    expected = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    keys = {_unwrapped(key): key for key in expected}
    flat = {_unwrapped(key): tensor for key, tensor in weights.state.items()}
    prefix = _prefix(flat, keys)
    inner = {key[len(prefix) :]: flat[key] for key in flat if key.startswith(prefix)}
    state = {keys[key]: tensor for key, tensor in inner.items() if key in keys}
    # Tables that layers compute, and that earlier versions of them saved.
    computed = {name for name, _ in model.named_buffers()}
    return _Fit(
        expected,
        state,
        unexpected=[key for key in inner if key not in keys and key not in computed],
        prefix=prefix,
        outside=[key for key in flat if not key.startswith(prefix)],
        head=frozenset() if num_classes is None else _head(model, expected, state, num_classes),
    )


def _unwrapped(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _prefix(keys: Collection[str], targets: Collection[str]) -> str:
    """What stands before the model's keys: the prefix under which most of them are.

    Several may do, as where a network and its average are in one file: then the average's.
    """
    counts = Counter(
        key.removesuffix(ending) for key in keys for ending in _endings(key) if ending in targets
    )
    if not counts:
        return ""
    return min(counts, key=lambda prefix: (-counts[prefix], "ema" not in prefix, len(prefix)))


def _endings(key: str) -> Iterator[str]:
    """A key, and what follows each of its dots."""
    parts = key.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def head_paths(model: nn.Module) -> list[str]:
    """Where a model's classifier is: as timm says, else its last layer; none without layers."""
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    return classifier_paths(model) or layers[-1:]


def classifier_paths(model: nn.Module) -> list[str]:
    """Where a model's classifier is by timm's `get_classifier`; empty for other models.

    Several where timm has several, as in distilled transformers; all of them have weights.
    """
    classifier = getattr(model, "get_classifier", None)
    modules = classifier() if callable(classifier) else []
    modules = modules if isinstance(modules, tuple | list) else [modules]
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in modules if names.get(module) and [*module.parameters()]]


def _head(
    model: nn.Module, expected: dict[str, Tensor], state: dict[str, Tensor], num_classes: int
) -> frozenset[str]:
    """Keys of a head whose weights are for another number of classes, or that has none.

    A layer that differs in its outputs alone is a head: what follows a hidden one differs as well.
    """
    paths = tuple(f"{path}." for path in head_paths(model))
    absent = [key for key in expected if key not in state and key.startswith(paths)]
    differing = [
        key
        for key, tensor in state.items()
        if expected[key].shape[:1] == (num_classes,) != tensor.shape[:1]
        and tensor.shape[1:] == expected[key].shape[1:]
    ]
    return frozenset([*absent, *differing])


def _advice(fit: _Fit) -> str:
    """The number of classes to ask for, if nothing but that differs."""
    outputs = {(fit.state[key].shape[:1], fit.expected[key].shape[:1]) for key in fit.misshapen}
    match len(fit.problems), list(outputs):
        case 1, [((trained,), (built,))] if trained != built:
            return (
                f"If that is the head, ask for its {trained} classes (--num-classes {trained}, or"
                f" num_classes={trained} in the model's arguments), or for {built} to begin with a"
                " new one."
            )
    return "Is it the architecture that was trained, with the same arguments?"


def _notes(fit: _Fit) -> Iterator[str]:
    """What a user should know of weights that fit."""
    if fit.prefix:
        yield f"weights: keys without {fit.prefix!r}"
    if fit.outside:
        yield f"weights left out, as they are not under {fit.prefix!r}: {joined(fit.outside)}"
    if fit.head:
        sizes = {len(fit.state[key]) for key in fit.head & fit.state.keys()}
        trained = f"for {max(sizes)} classes" if sizes else "without one"
        yield f"a fresh head, as the weights are {trained}: {joined(sorted(fit.head))}"
    casts = {
        f"{tensor.dtype} to {fit.expected[key].dtype}".replace("torch.", "")
        for key, tensor in fit.state.items()
        if tensor.is_floating_point() and tensor.dtype != fit.expected[key].dtype
    }
    if casts:
        yield f"weights cast from {', '.join(sorted(casts))}"
