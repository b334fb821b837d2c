"""Anytime answers of an exported ensemble, without PyTorch.

This one file needs numpy and onnxruntime (image files: Pillow) and lies beside every export:

    from anytime import Anytime

    model = Anytime("exported/NAME", threads=2)
    images = model.open("photo.jpg")              # [1, C, H, W], prepared as in training
    for step in model.anytime(images):            # answers that get better
        print(step.leaves, step.logits.argmax(-1), step.elapsed)
    model.predict(images, leaves=4)               # logits [N, K]
    model.calibrate(images)                       # once per machine, for deadlines
    model.predict(images, deadline=0.005).leaves  # as many as there is time for
    model.predict(images, confidence=0.9).leaves  # as many as each image needs

Steps run one after the other: each computes its new leaves from values that earlier ones kept.
Whatever is wrong with a call or a file raises an `AnytimeError`. Below are, in this order: errors
and answers, `Anytime`, `Session`, confidence, deadlines, engines, the files, and images.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import platform
import re
import secrets
import stat
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from numbers import Real
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# From how many leaves to how many.
Transition = tuple[int, int]
# Called with every answer, and the positions `[M]` of its images in the batch.
Observer = Callable[["Answer", Array], None]

_IMAGES = "images"  # the steps' input; their others are values that were kept
# What a terminal obeys instead of showing it.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class AnytimeError(ValueError):
    """Base of every error raised here: what is wrong, and what was expected, found and is next."""

    def __init__(
        self,
        where: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        next_step: str | None = None,
    ) -> None:
        details = {"Expected ": expected, "Found ": found, "": next_step}
        lines = [f"  {label}{text}" for label, text in details.items() if text is not None]
        text = "\n".join([where, *lines])
        super().__init__(_OBEYED.sub(lambda match: ascii(match[0])[1:-1], text))


class ExportError(AnytimeError):
    """An exported directory or a file of it is missing, damaged or of another version."""


class EngineError(AnytimeError):
    """An engine is unknown or not installed."""


class InputError(AnytimeError):
    """An argument or an array does not fit the model."""


class LeafError(AnytimeError):
    """A number of leaves lies outside the tree, or no step ends there."""


@dataclass(frozen=True)
class Answer:
    """The answer of a session's leaves so far.

    Args:
        leaves: how many leaves it averages.
        logits: their mean, `[N, K]`.
        elapsed: seconds of computing since the session began.
        macs: multiply-accumulates per image since the session began.
    """

    leaves: int
    logits: Any
    elapsed: float
    macs: int


class Prediction(NamedTuple):
    """What became of a limit: of a deadline, or of a confidence.

    Args:
        logits: the mean over each image's leaves, `[N, K]`.
        leaves: how many leaves each image used, `[N]` integers; by a deadline all used as many.
        seconds: from the call to the answer.
        met: whether that was within the deadline; None if there was none.
    """

    logits: Any
    leaves: Array
    seconds: float
    met: bool | None = None


class Anytime:
    """An exported ensemble: maps images to answers that get better. Threads may share it.

    A pool of threads that spins waits busily for its next call, which is fastest where it is alone.
    Two that spin in one process, this and PyTorch's say, slow each other tenfold: then pass
    `spinning=False`, or leave the other a single thread (`torch.set_num_threads(1)`).

    Every step has a pool of its own, which is woken when the step begins and told to sleep when it
    ends. `shared_threads` keeps one awake for all steps and models, which saves a tenth of the time
    in a small network; the process then has no other sessions of ONNX Runtime than such.

    Args:
        directory: what `treeify export` wrote.
        threads: that compute one call; by default as many as there are physical cores.
        engine: `onnxruntime` or `openvino`.
        preload: which later steps' files are opened ahead of time, in a thread: `all`, the `next`
            one, or `none`, which waits until a step is needed. The first one is opened at once.
        verify: compare every file with its checksum when it is opened.
        spinning: whether the engine's idle threads wait busily.
        shared_threads: use the threads that ONNX Runtime lets all sessions of a process share,
            which spin. The first to ask for them says how many there are.

    Attributes:
        name: what was exported.
        sizes: numbers of leaves at which steps end.
        leaves: the last of them.
        macs: multiply-accumulates per image, by size.
        classes: names of the outputs, or None.
        budgets: sizes and confidence thresholds, by the mean MACs per image that they spend.
        shape: of the images, `("batch", C, H, W)`, or with a number for "batch".
        setting: the machine, the engine and its threads, one phrase, which latencies are of.
        droppable: whether images can leave the batch between steps.
        manifest: all of ensemble.json.

    Raises:
        ExportError: it is no export, of another version, or a file is missing or damaged.
        EngineError: there is no such engine, it is not installed, or the process shares its threads
            in another way.
        InputError: another argument is of a wrong kind.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        threads: int | None = None,
        engine: str = "onnxruntime",
        preload: str = "next",
        verify: bool = True,
        spinning: bool = True,
        shared_threads: bool = False,
    ) -> None:
        is_path = isinstance(directory, str | os.PathLike)
        _require(is_path, "directory", "the path of an exported directory", directory)
        _require(threads is None or _counts(1)(threads), "threads", "1 or more, or None", threads)
        _require(preload in ("all", "next", "none"), "preload", "'all', 'next' or 'none'", preload)
        if engine not in ENGINES:
            known = ", ".join(ENGINES)
            raise EngineError(
                "there is no such engine.", expected=f"one of {known}", found=_described(engine)
            )
        if shared_threads:
            _require(engine == "onnxruntime", "engine", "'onnxruntime' to share threads", engine)
            _require(spinning, "spinning", "True where threads are shared", spinning)
        # Later steps are opened when the process may be in another directory.
        self.path, self.threads, self.engine = Path(directory).absolute(), threads, engine
        self.verify, self.spinning, self.shared_threads = verify, spinning, shared_threads
        self.manifest = manifest = _read_manifest(self.path)
        self._steps, self._batch_dims = _steps_of(manifest)
        self.name: str = manifest["name"]
        self.sizes = tuple(step.leaves for step in self._steps)
        self.leaves = self.sizes[-1]
        self.macs = {size: int(manifest["macs"][str(size)]) for size in self.sizes}
        self.classes: list[str] | None = manifest.get("classes")
        self.budgets: dict[float, tuple[tuple[int, ...], tuple[float, ...]]] = {
            budget["target_macs"]: (tuple(budget["sizes"]), tuple(budget["thresholds"]))
            for budget in manifest["budgets"]
        }
        self.shape: tuple[int | str, ...] = tuple(manifest["images"]["shape"])
        self.droppable: bool = manifest["droppable"] and self.shape[0] == "batch"
        self._dtype = np.dtype(manifest["images"]["dtype"])
        # What was measured of other steps does not count.
        digests = " ".join(step.files[0]["sha256"] for step in self._steps)
        self._checksum = hashlib.sha256(digests.encode()).hexdigest()
        self._lock = threading.Lock()
        self._measured: dict[str, Latencies] | None = None  # as long as nobody has read the file
        self._slowdowns: dict[str, deque[float]] = {}
        self._open_next, count = preload == "next", len(self._steps)
        self._locks = [threading.Lock() for _ in range(count)]
        self._graphs: list[Graph | None] = [None] * count
        self._opening = [0.0] * count  # seconds that it took
        self._asked: set[int] = {0}  # steps that somebody opens or has opened
        for entry in (entry for step in self._steps for entry in step.files):
            _check_file(self.path, entry, verify=verify)
        self._graph(0)
        if preload == "all":
            self._open_ahead(range(count))
        cores = "all cores" if threads is None else f"threads: {threads}"
        version = str(sys.modules[engine].__version__).partition("-")[0]
        how = ", shared" if shared_threads else "" if spinning else ", not spinning"
        self.setting = f"{_machine()}, {engine} {version}, {cores}{how}"

    def session(self, images: Array) -> "Session":
        """Anytime inference on a batch, to be advanced, stopped and resumed as you like.

        Args:
            images: `[N, C, H, W]`.

        Raises:
            InputError: the images do not fit.
        """
        return Session(self, self._checked(images))

    def anytime(self, images: Array, sizes: Sequence[int] | None = None) -> Iterator[Answer]:
        """Answers that get better: one for every size, nothing computed twice.

        Args:
            images: `[N, C, H, W]`.
            sizes: increasing numbers of leaves; all `sizes` if not given.

        Yields:
            An `Answer`: leaves, their mean logits `[N, K]`, seconds and MACs per image so far.

        Raises:
            LeafError: no step ends at a size, or sizes do not increase.
            InputError: the images do not fit.
        """
        session = self.session(images)
        for size in self.sizes if sizes is None else sizes:
            self._check_size(size)  # None would be the next one
            if size == session.leaves:
                raise LeafError(
                    f"{size} leaves are asked for twice.",
                    expected="increasing sizes",
                    next_step="Name each size once.",
                )
            yield session.advance(to=size)

    def predict(
        self,
        images: Array,
        leaves: int | None = None,
        *,
        deadline: float | None = None,
        confidence: float | Sequence[float] | None = None,
        budget: float | None = None,
        observe: Observer | None = None,
    ) -> Any:
        """Mean logits, of as many leaves as asked for or as there is time or need for.

        Args:
            images: `[N, C, H, W]`.
            leaves: average the first `leaves` leaves, one of `sizes`; all if nothing is given.
            deadline: seconds from the call; steps follow one another while the next is expected to
                end in time. Needs `calibrate` for this shape on this machine. How slow the last
                calls were against it is remembered, and expected of the next.
            confidence: stop adding leaves to an image once the probability of its likeliest class
                reaches this; one value, or one for every size but the last. Sure images leave the
                batch.
            budget: mean MACs per image; the confidence thresholds that were chosen for it.
            observe: called with every answer on the way and the positions `[M]` of the images it is
                for. Its time counts towards a deadline.

        Returns:
            `[N, K]`; with a deadline, confidence or budget a `Prediction`: logits `[N, K]`, leaves
            per image `[N]`, the seconds it took, and whether a deadline was met.

        Raises:
            LeafError: no step ends at so many leaves.
            InputError: the images do not fit, several limits are given, one is none, or nothing
                was measured for these images.
        """
        begin = time.perf_counter()
        if sum(limit is not None for limit in (leaves, deadline, confidence, budget)) > 1:
            raise InputError(
                "several limits were given.",
                expected="leaves, deadline, confidence or budget",
                next_step="Give one of them.",
            )
        if deadline is not None:
            _check_deadline(deadline)
            session = self.session(images)
            self._advance_until(session, deadline, begin, observe)
            logits, used = session.logits, np.full(len(images), session.leaves)
            seconds = time.perf_counter() - begin
            return Prediction(logits, used, seconds, seconds <= deadline)
        if confidence is not None or budget is not None:
            limit = confidence if budget is None else self._saved_thresholds(budget)
            thresholds = _thresholds(limit, self.sizes)
            logits, used = _answer(self.session(images), self.sizes, thresholds, observe)
            return Prediction(logits, used, time.perf_counter() - begin)
        last = self.leaves if leaves is None else leaves
        self._check_size(last)
        session = self.session(images)
        if observe is None:
            return session.advance(to=last).logits
        while session.leaves < last:
            observe(session.advance(), np.arange(len(images)))
        return session.logits

    def calibrate(self, images: Array, *, repeats: int = 50, budget: float = 30.0) -> "Latencies":
        """Measure how long the steps take for inputs like these on this machine.

        `predict(images, deadline=...)` goes by it. Calibrate under the load you expect. Kept in
        latencies.json beside the export.

        Args:
            images: `[N, C, H, W]`.
            repeats: rounds to measure, each with every step.
            budget: seconds after which no more are begun, once five are measured.

        Returns:
            The seconds of every transition; prints as a table.

        Raises:
            InputError: the images do not fit, or fewer than two rounds are asked for.
        """
        _require(_counts(2)(repeats), "repeats", "an integer of at least 2", repeats)
        _require(_is_number(budget) and budget >= 0, "budget", "seconds of at least 0", budget)
        images = self._checked(images)
        timings = _measure(lambda: Session(self, images), repeats, budget)
        situation = self._situation(images)
        latencies = _summary(timings, self.sizes, situation, self._checksum, self._opening)
        with self._lock:
            self._save(latencies)
        self._slowdowns.pop(situation, None)
        return latencies

    @property
    def latencies(self) -> "dict[str, Latencies]":
        """What was measured, here or by earlier processes, by situation.

        Raises:
            ExportError: the file that keeps it is damaged.
        """
        if self._measured is None:
            self._measured = _read_latencies(self.path)
        return self._measured

    def open(self, file: str | os.PathLike[str] | IO[bytes]) -> NDArray[np.float32]:
        """An image file as a batch of one, `[1, C, H, W]`, prepared as in evaluation.

        Args:
            file: its path, or the open file, in any format that Pillow decodes.

        Raises:
            InputError: the file is missing, damaged, far too large, or has floats or integers of 32
                bits, whose range nobody knows; or it is not known how images are prepared.
            EngineError: Pillow is not installed.
        """
        preparation = self.manifest.get("preparation") or {}
        if preparation.get("mean") is None or preparation.get("std") is None:
            raise InputError(
                "it is not known how images are prepared for this ensemble.",
                expected="mean and std of the channels, pixels in 0 to 1",
                next_step="Name them before exporting: treeify convert --mean ... --std ..., or"
                " hne.preparation = treeify.data.Preparation(size=(H, W), mean=..., std=...).",
            )
        return _open_image(file, preparation)[None]

    def _checked(self, images: Any) -> Array:
        """The images as the steps take them, contiguous; those that do not fit are refused."""
        is_array = isinstance(images, np.ndarray) and images.ndim == len(self.shape)
        has_shape = is_array and images.shape[1:] == self.shape[1:]
        if not has_shape or self.shape[0] not in ("batch", len(images)):
            raise self._misfit("the input does not fit the model.", images)
        if images.dtype != self._dtype:
            raise self._misfit("the images' dtype does not fit the model.", images)
        if not len(images):
            raise _no_images(f"shape {images.shape}")
        return np.require(images, requirements=("C", "A"))

    def _misfit(self, what: str, images: Any) -> InputError:
        dims = ", ".join("N" if dim == "batch" else str(dim) for dim in self.shape)
        expected, next_step = f"images of shape [{dims}], {self._dtype}", None
        if not isinstance(images, np.ndarray):
            expected, found = f"a numpy array, {expected}", _described(images)
            next_step = "Convert it: numpy.asarray(x), or x.numpy() of a tensor."
        else:
            found = f"shape {images.shape}, {images.dtype}"
            if images.shape == self.shape[1:]:
                next_step = "A single image becomes a batch by images[None]."
            elif images.dtype == np.uint8:
                next_step = f"Convert them: images.astype({self._dtype.name!r}) / 255, normalised"
                next_step += " as in training."
            elif images.dtype != self._dtype:
                next_step = f"Convert them: images.astype({self._dtype.name!r})."
        return InputError(what, expected=expected, found=found, next_step=next_step)

    def _check_size(self, leaves: object) -> None:
        """Raise LeafError unless a step ends there."""
        if _counts(1)(leaves) and leaves in self.sizes:
            return
        where = f"{_described(leaves)} leaves were asked for."
        next_step = "Ask for fewer, or leave the number out for all of them."
        if _counts(1, self.leaves)(leaves):
            where = f"no step ends at {leaves} leaves."
            next_step = "Ask for one of them, or export that size: treeify export --sizes."
        raise LeafError(where, expected=f"one of {self.sizes}", next_step=next_step)

    def _graph(self, index: int) -> "Graph":
        """A step, opened; with `preload="next"` a thread opens the one after it meanwhile."""
        graph = self._graphs[index] or self._open_step(index)
        if self._open_next and index + 1 < len(self._graphs):
            self._open_ahead((index + 1,))
        return graph

    def _open_step(self, index: int) -> "Graph":
        with self._locks[index]:
            graph = self._graphs[index]
            if graph is None:  # no other thread was faster
                begin = time.perf_counter()
                graph = _open_graph(self, self._steps[index])
                self._opening[index] = time.perf_counter() - begin
                self._graphs[index] = graph
        return graph

    def _open_ahead(self, indices: Sequence[int]) -> None:
        """Start a thread that opens steps; where one is damaged, who needs it will say so."""
        if self._asked.issuperset(indices):
            return
        with self._lock:
            new = [index for index in indices if index not in self._asked]
            self._asked.update(new)

        def open_steps() -> None:
            for index in new:
                with suppress(AnytimeError):
                    self._open_step(index)

        if new:
            threading.Thread(target=open_steps, name="anytime: opens steps").start()

    def _situation(self, images: Array) -> str:
        """What latencies are of: the images' shape, the machine, the engine and its threads."""
        return f"{'x'.join(map(str, images.shape))} {images.dtype}, {self.setting}"

    def _advance_until(
        self, session: "Session", deadline: float, begin: float, observe: Observer | None
    ) -> None:
        """Add leaves while the next step is forecast to end in time, at least the first ones.

        A forecast is the step's typical time, times the recent slowdown or this session's if that
        is larger, times the step's margin; and the time to open its file, if it is not open. The
        time that is then left decides again. `deadline` counts from `begin`, a
        `time.perf_counter()`.
        """
        count, situation = session._images, self._situation(session._values[_IMAGES])
        latencies = _find(self.latencies, situation, self._checksum)
        self._open_ahead(range(len(self._graphs)))
        slowdown = self._slowdowns.setdefault(situation, deque(maxlen=3))
        forecast = Forecast(latencies.typical, slowdown)
        for index, transition in enumerate(pairwise((0, *self.sizes))):
            seconds = forecast.seconds(transition) * latencies.margins[transition]
            if self._graphs[index] is None:
                seconds += _OPENING_MARGIN * latencies.opening[index]
            if index and seconds > deadline - (time.perf_counter() - begin):
                break
            self._graph(index)  # opening a file says nothing of how slow computing is
            now = time.perf_counter()
            answer = session.advance()
            forecast.observe(transition, time.perf_counter() - now)
            if observe is not None:
                observe(answer, np.arange(count))

    def _saved_thresholds(self, target: float) -> tuple[float, ...]:
        """The thresholds that were chosen for a number of MACs per image."""
        is_target = _is_number(target) and math.isfinite(target)
        if not is_target or target not in self.budgets:
            saved = ", ".join(f"{macs:,}" for macs in sorted(self.budgets))
            amount = f"{target:,.0f}" if is_target else _described(target)
            raise InputError(
                f"no thresholds are saved for a budget of {amount} MACs per image.",
                expected=f"one of {saved}" if saved else "a budget that was calibrated",
                found=None if saved else "none, no budget has been calibrated",
                next_step="Choose them: treeify calibrate DIR --target-macs N; then export again.",
            )
        sizes, thresholds = self.budgets[target]
        if sizes != self.sizes:
            raise InputError(
                "the budget was made for another tree.",
                expected=f"thresholds for {self.sizes} leaves",
                found=f"thresholds for {sizes}",
                next_step="Export all of its sizes, or choose thresholds for these.",
            )
        return thresholds

    def _save(self, latencies: "Latencies") -> None:
        """Remember latencies, here and in the file, with those that other processes wrote."""
        try:
            measured = _read_latencies(self.path)
        except ExportError as error:
            warnings.warn(f"{error}\n  It is written anew.", stacklevel=3)
            measured = {}
        measured |= (self._measured or {}) | {latencies.situation: latencies}
        self._measured = measured
        try:
            _write_latencies(self.path, measured)
        except OSError as error:
            warnings.warn(
                f"{self.path / _LATENCIES} cannot be written: {_first_line(error)}. What was"
                " measured holds for this process only.",
                stacklevel=3,
            )


class Session:
    """Anytime inference on one batch that can be stopped and resumed; made by `model.session`.

    Nothing is computed twice. Between answers the leaf logits so far are kept, and the values that
    later steps read. A session is for one thread at a time.
    """

    def __init__(self, model: Anytime, images: Array) -> None:
        self._model = model
        self._values: dict[str, Array] = {_IMAGES: images}
        # The leaf logits of each step, by the name of the base model's output.
        self._logits: dict[str, list[Array]] = {name: [] for name in model._steps[0].logits}
        self._done = 0  # steps
        self._images = len(images)
        self._elapsed = 0.0

    @property
    def leaves(self) -> int:
        """How many leaves are computed."""
        return self._model.sizes[self._done - 1] if self._done else 0

    @property
    def done(self) -> bool:
        """Whether all leaves are computed."""
        return self._done == len(self._model.sizes)

    @property
    def elapsed(self) -> float:
        """Seconds spent computing; the time between answers does not count."""
        return self._elapsed

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image so far."""
        return self._model.macs[self.leaves] if self._done else 0

    @property
    def leaf_logits(self) -> Any:
        """Logits of every leaf so far, `[N, leaves, K]`.

        Raises:
            LeafError: no leaf is computed yet.
        """
        return self._structured(lambda leaf_logits: leaf_logits)

    @property
    def logits(self) -> Any:
        """The present answer, the mean over the leaves so far: `[N, K]`.

        Raises:
            LeafError: no leaf is computed yet.
        """
        return self._structured(_mean)

    @property
    def cached_bytes(self) -> int:
        """Memory of the values kept for the next answers."""
        return sum(value.nbytes for name, value in self._values.items() if name != _IMAGES)

    @property
    def droppable(self) -> bool:
        """Whether images can leave the batch: no value between steps mixes or counts them."""
        return self._model.droppable

    def select(self, images: Array | Sequence[int]) -> None:
        """Go on with some of the images only.

        Args:
            images: their positions in the present batch, `[M]` integers, or a mask of it, `[N]`
                booleans.

        Raises:
            InputError: it is neither; or the model carries the batch size from step to step, see
                `droppable`. Nothing has changed then.
        """
        if not self.droppable:
            raise InputError(
                "images cannot leave this session's batch.",
                expected="a model whose values between levels have one row per image",
                next_step="Run all images and ignore those that are answered.",
            )
        rows, dims = _positions(images, self._images), self._model._batch_dims
        for name, value in self._values.items():
            self._values[name] = _rows(value, rows, self._images, dims[name])
        for parts in self._logits.values():
            parts[:] = [part.take(rows, axis=0) for part in parts]
        self._images = len(rows)

    keep = select

    def advance(self, to: int | None = None) -> Answer:
        """Add leaves.

        Args:
            to: how many leaves to reach, one of the model's sizes; the next one if not given.

        Returns:
            The answer with these leaves.

        Raises:
            LeafError: all leaves are computed, no step ends there, or more are already.
            InputError: no images are left, or the step cannot compute with them.
            ExportError: the file of a step is not what was exported.
        """
        sizes = self._model.sizes
        if to is None and self.done:
            raise LeafError(
                f"all {self.leaves} leaves are computed.",
                next_step="Ask session.done before advancing.",
            )
        to = sizes[self._done] if to is None else to
        self._model._check_size(to)
        if to < self.leaves:
            raise LeafError(
                f"{self.leaves} leaves are computed already, {to} were asked for.",
                expected=f"one of {sizes[self._done - 1 :]}",
                next_step="Ask for smaller sizes first, or start another session.",
            )
        if not self._images:
            error = _no_images("a session whose images have all left")
            raise error
        begin = time.perf_counter()
        while self.leaves < to:
            self._run(self._model._steps[self._done], self._model._graph(self._done))
        self._elapsed += time.perf_counter() - begin
        return Answer(to, self.logits, self._elapsed, self.macs)

    def _run(self, step: "Step", graph: "Graph") -> None:
        values = self._values
        try:
            outputs = graph.run({name: values[name] for name in step.inputs}, step.fetched)
        except Exception as error:  # engines have errors of their own
            raise InputError(
                f"{step.files[0]['file']} cannot compute with these {self._images} images.",
                found=_first_line(error),
                next_step="Export again with the --batch and --input-size that you need.",
            ) from error
        for name, output in zip(step.fetched, outputs, strict=True):
            if name in self._logits:
                self._logits[name].append(output)
            else:
                values[name] = output
        for name in step.dropped:
            values.pop(name, None)
        self._done += 1

    def _structured(self, of: Callable[[Array], Array]) -> Any:
        """The base model's output, with something of the leaf logits in each tensor's place."""
        if not self._done:
            raise LeafError("no leaf is computed yet.", next_step="Call session.advance() first.")
        for parts in self._logits.values():
            if len(parts) > 1:
                parts[:] = [np.concatenate(parts, axis=min(1, parts[0].ndim - 1))]
        arrays = {name: of(*parts) for name, parts in self._logits.items()}
        return _fill(self._model.manifest["output"], arrays)


def _mean(leaf_logits: Array) -> Array:
    """The mean over the leaves, `[N, leaves, K] -> [N, K]`; of integers, what most leaves give."""
    axis = min(1, leaf_logits.ndim - 1)
    if leaf_logits.dtype.kind in "fc":
        dtype = leaf_logits.dtype
        wide = np.dtype(np.float32) if dtype == np.float16 else dtype
        total: Array = np.add.reduce(leaf_logits, axis=axis, dtype=wide)
        mean: Array = total / wide.type(leaf_logits.shape[axis])
        return mean.astype(dtype, copy=False)
    ranked = np.moveaxis(np.sort(leaf_logits, axis=axis), axis, -1)
    votes = (ranked[..., None] == ranked[..., None, :]).sum(-1)
    best: Array = np.take_along_axis(ranked, votes.argmax(-1)[..., None], axis=-1)[..., 0]
    return best


def _fill(structure: Any, arrays: Mapping[str, Array]) -> Any:
    """An output of the base model: arrays in the place of their names."""
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return arrays[content]
    if kind == "dict":
        return {key: _fill(value, arrays) for key, value in content.items()}
    if kind == "constant":
        return content
    parts = [_fill(value, arrays) for value in content]
    return tuple(parts) if kind == "tuple" else parts


def _rows(value: Array, rows: Array, batch: int, axis: int | None) -> Array:
    """Some images' part of a value, along whose axis one image's entries follow another's."""
    if axis is None or not batch:
        return value
    before, after = value.shape[:axis], value.shape[axis + 1 :]
    by_image = value.reshape(*before, batch, value.shape[axis] // batch, *after)
    count = len(rows) * by_image.shape[axis + 1]
    return by_image.take(rows, axis=axis).reshape(*before, count, *after)


def _positions(images: Array | Sequence[int], batch: int) -> Array:
    """Positions in a batch, `[M]`, from such or from a mask of it."""
    try:
        chosen = np.asarray(images)
    except (TypeError, ValueError, OverflowError):  # of what is no list of numbers
        chosen = np.asarray(None)
    if chosen.dtype == bool and chosen.shape == (batch,):
        return np.flatnonzero(chosen)
    inside = chosen.dtype.kind in "iu" and bool(((chosen >= 0) & (chosen < batch)).all())
    if chosen.shape == (0,) or (chosen.ndim == 1 and inside):
        return chosen.astype(np.intp)
    raise InputError(
        "these are no images of this session's batch.",
        expected=f"positions from 0 to {batch - 1}, [M] integers, or [{batch}] booleans",
        found=_described(images),
        next_step="Positions count from those selected last; `leaf_logits` has as many rows.",
    )


def _probability(logits: Array) -> Array:
    """Of the likeliest class, `[..., K] -> [...]`."""
    total: Array = np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    return np.reciprocal(total)


def _answer(
    session: Session, sizes: Sequence[int], thresholds: Sequence[float], observe: Observer | None
) -> tuple[Array, Array]:
    """Advance a session until every image is confident; confident images leave the batch.

    Returns:
        Mean logits `[N, K]` of each image's leaves, and how many leaves it used, `[N]`.

    Raises:
        InputError: the model returns no single array of logits.
    """
    leaves = np.zeros(session._images, dtype=np.int64)
    logits: Array | None = None
    pending = batch = np.arange(len(leaves))  # images that are not yet confident, and all
    for size, threshold in zip(sizes, (*thresholds, None), strict=True):
        answer = session.advance(to=size)
        scores = answer.logits
        if not isinstance(scores, np.ndarray):
            kind = type(scores).__name__
            raise InputError("confidence needs one array of logits.", expected="[N, K]", found=kind)
        logits = scores.copy() if logits is None else logits
        if observe is not None:
            observe(answer, pending if session.droppable else batch)
        scores = scores if session.droppable else scores[pending]
        confident = np.ones(len(scores), dtype=bool)
        if threshold is not None:
            confident = _probability(scores) >= threshold
        logits[pending[confident]] = scores[confident]
        leaves[pending[confident]] = size
        pending = pending[~confident]
        if not len(pending):
            break
        if session.droppable and confident.any():
            session.select(~confident)
    assert logits is not None
    return logits, leaves


def _thresholds(limit: Any, sizes: Sequence[int]) -> tuple[float, ...]:
    """One threshold for every size but the last, each at least 0."""
    count = len(sizes) - 1
    is_list = isinstance(limit, Sequence) and not isinstance(limit, str | bytes)
    thresholds = limit if is_list else [limit] * count
    # One that is none is refused even where there is but one size.
    checked = limit if is_list else [limit]
    if len(thresholds) != count or not all(_is_number(value) and value >= 0 for value in checked):
        raise InputError(
            f"confidence={_described(limit)} fits no ensemble of {sizes[-1]} leaves.",
            expected=f"a probability, or one for each of {tuple(sizes[:-1])} leaves"
            " (above 1: never stop there)",
            found=", ".join(map(_described, checked[:8])) or "none",
            next_step="Pass one probability, such as 0.9, for all sizes.",
        )
    return tuple(thresholds)


_LATENCIES = "latencies.json"
# Deadlines are to be kept 99 times in 100: a margin is such that, where only just enough time is
# left, 99 of 100 forecasts hold. The median alone would miss every second one.
_PERCENT = 99
# Fewer rounds than these show no spread, so they are measured whatever they take.
_MIN_ROUNDS = 5
# Files are read from disk once and from memory ever after: opening one varies more than computing.
_OPENING_MARGIN = 3


@dataclass(frozen=True)
class Latencies:
    """How long every transition between sizes took on this machine.

    Args:
        situation: the images' shape, the machine, the engine and its threads, as text.
        checksum: of the export's steps.
        sizes: numbers of leaves at which steps end.
        opening: seconds that opening each step's file took.
        repeats: how many rounds were measured.
        typical: median seconds of every transition, by its leaves before and afterwards: from 0
            straight to every size, and from every size to the next.
        slow: the 99th percentile of the same.
        margins: what a forecast of each transition is multiplied by to hold 99 times in 100.
    """

    situation: str
    checksum: str
    sizes: tuple[int, ...]
    opening: tuple[float, ...]
    repeats: int
    typical: dict[Transition, float]
    slow: dict[Transition, float]
    margins: dict[Transition, float]

    def rows(self) -> list[list[str]]:
        """A table: milliseconds from no leaf straight to each size, and from each to the next."""
        rows = [["from", *(f"to {size}" for size in self.sizes)]]
        for start in (0, *self.sizes[:-1]):
            keys = [(start, stop) for stop in self.sizes]
            cells = [
                f"{1e3 * self.typical[key]:.2f} ({1e3 * self.slow[key]:.2f})"
                if key in self.typical
                else ""
                for key in keys
            ]
            rows.append([str(start), *cells])
        return rows

    def __str__(self) -> str:
        """The situation, and a table of milliseconds."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        margins = f"margins {min(self.margins.values()):.2f} to {max(self.margins.values()):.2f}"
        title = f"{self.situation} ({self.repeats} rounds, {margins})"
        return "\n".join([title, "leaves; ms, and the 99th percentile", *lines])


_TABLES = ("typical", "slow", "margins")


@dataclass
class Forecast:
    """How long a session's next step is likely to take, by what was observed so far.

    `slowdown` holds the last three steps' times over their typical ones, of any session: other work
    on a machine slows down several in a row, and their median tells such a spell from a single slow
    step. This session's steps took `spent` seconds where `expected` are typical.
    """

    typical: Mapping[Transition, float]
    slowdown: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    spent: float = 0.0
    expected: float = 0.0

    def seconds(self, transition: Transition) -> float:
        """The typical time, times the recent slowdown or this session's if that is larger."""
        recent = tuple(self.slowdown)  # at once: other threads add to it
        ratio = median(recent) if recent else 1.0
        if self.expected:
            # A session cannot wait for a median of three: its own deadline is at stake.
            ratio = max(ratio, self.spent / self.expected)
        return self.typical[transition] * ratio

    def observe(self, transition: Transition, seconds: float) -> None:
        """Learn from a step."""
        if typical := self.typical[transition]:
            self.slowdown.append(seconds / typical)
        self.spent += seconds
        self.expected += typical


def _measure(start: Callable[[], Session], repeats: int, budget: float) -> list[list[float]]:
    """The seconds of every step, in rounds; after one to warm up, until the budget is spent."""
    timings: list[list[float]] = []
    begin = time.perf_counter()
    while len(timings) <= repeats:
        if len(timings) > _MIN_ROUNDS and time.perf_counter() - begin > budget:
            break
        session, times = start(), []
        while not session.done:
            before = time.perf_counter()
            session.advance()
            times.append(time.perf_counter() - before)
        timings.append(times)
    return timings[1:]


def _summary(
    timings: Sequence[Sequence[float]],
    sizes: tuple[int, ...],
    situation: str,
    checksum: str,
    opening: Sequence[float],
) -> Latencies:
    """What the seconds of every step of several sessions come to.

    For margins, forecasts learn from one session to the next as they do in use, so that a margin
    covers only what the slowdown did not foretell.
    """
    steps = list(pairwise((0, *sizes)))
    straight = [(0, size) for size in sizes]
    columns: dict[Transition, list[float]] = {key: [] for key in (*straight, *steps)}
    for times in timings:
        sums = dict(zip(straight, accumulate(times), strict=True))
        for key, seconds in (sums | dict(zip(steps, times, strict=True))).items():
            columns[key].append(seconds)
    typical = {key: median(column) for key, column in columns.items()}
    ratios: dict[Transition, list[float]] = {key: [] for key in columns}
    slowdown: deque[float] = deque(maxlen=3)
    for times in timings:
        forecast, total = Forecast(typical, slowdown), 0.0
        likely = {key: forecast.seconds(key) for key in straight}
        for key, step, seconds in zip(straight, steps, times, strict=True):
            likely[step], total = forecast.seconds(step), total + seconds
            for name, took in {key: total, step: seconds}.items():
                ratios[name].append(took / likely[name] if likely[name] else 1.0)
            forecast.observe(step, seconds)
    slow, margins = (
        {key: quantiles(rows[key], n=100, method="inclusive")[_PERCENT - 1] for key in rows}
        for rows in (columns, ratios)
    )
    repeats = len(timings)
    return Latencies(situation, checksum, sizes, tuple(opening), repeats, typical, slow, margins)


def _check_deadline(deadline: object) -> None:
    if not _is_number(deadline) or deadline <= 0:  # type: ignore[operator]
        raise InputError(
            f"deadline={_described(deadline)} has passed before it began, or is none.",
            expected="seconds above 0",
            next_step="20 ms are deadline=0.02; leave it out to take all the time that is needed.",
        )


def _find(measured: Mapping[str, Latencies], situation: str, checksum: str) -> Latencies:
    """The latencies measured for a situation and these steps."""
    latencies = measured.get(situation)
    if latencies is not None and latencies.checksum == checksum:
        return latencies
    others = [
        other if latencies.checksum == checksum else f"{other}, another export"
        for other, latencies in measured.items()
    ]
    raise InputError(
        "no latencies are known for this input on this machine.",
        expected=situation,
        found="; ".join(others) or "none, the ensemble has not been calibrated",
        next_step="Measure them with model.calibrate(images), or treeify calibrate DIR on files.",
    )


def _read_latencies(directory: Path) -> dict[str, Latencies]:
    """What latencies.json holds, by situation; ExportError where it is damaged."""
    path = directory / _LATENCIES
    if not os.path.lexists(path):
        return {}
    measured: dict[str, Latencies] = {}
    try:
        values = _read_json(path)
        _check(values, {"latencies": [_MEASURED]})
        for row in values["latencies"]:
            keys, sizes, opening = (tuple(row[key]) for key in ("transitions", "sizes", "opening"))
            keys = tuple(map(tuple, keys))
            needed = {(0, size) for size in sizes} | set(pairwise((0, *sizes)))
            if set(keys) != needed or len(opening) != len(sizes):
                raise ValueError("there are transitions too few or too many")
            tables = (dict(zip(keys, row[name], strict=True)) for name in _TABLES)
            situation, checksum, repeats = row["situation"], row["checksum"], row["repeats"]
            measured[situation] = Latencies(situation, checksum, sizes, opening, repeats, *tables)
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{path} is damaged or cannot be read: {_first_line(error)}",
            next_step="Measure again: model.calibrate(images) writes it anew. Or remove it.",
        ) from error
    return measured


def _write_latencies(directory: Path, measured: Mapping[str, Latencies]) -> None:
    """Replace latencies.json, completely or not at all."""
    rows = [
        vars(row)
        | {"transitions": list(row.typical)}
        | {name: list(getattr(row, name).values()) for name in _TABLES}
        for row in measured.values()
    ]
    path = directory / _LATENCIES
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps({"latencies": rows}, indent=2) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Threads(NamedTuple):
    """That compute one call of a step.

    Args:
        number: how many; None for all cores.
        spinning: whether they wait busily for the next.
        shared: whether they are those of the process, not the step's own.
    """

    number: int | None = None
    spinning: bool = True
    shared: bool = False


class Graph(Protocol):
    """A step that an engine has opened; threads may run it at once.

    Args:
        model: the file's content, or its path.
        threads: that compute one call.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]

    def __init__(self, model: bytes | str, threads: Threads) -> None: ...

    def run(self, arrays: dict[str, Array], outputs: Sequence[str]) -> Sequence[Array]:
        """Some outputs, from the arrays of all inputs."""


class _SharedThreads:
    """The threads that all of a process's sessions of ONNX Runtime share, once somebody asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = self._count = 0

    def require(self, count: int | None) -> None:
        """Make them, or raise EngineError unless there are so many; None takes what is there."""
        import onnxruntime

        with self._lock:
            if not self._process:
                try:
                    onnxruntime.set_global_thread_pool_sizes(count or 0, 1)
                except Exception as error:  # it has none, or whoever made them did not do it here
                    raise EngineError(
                        "ONNX Runtime cannot share so many threads in this process.",
                        found=_first_line(error),
                        next_step="Pass shared_threads=False, or let Anytime make the threads.",
                    ) from error
                self._process, self._count = os.getpid(), count or 0
        if self._process != os.getpid():
            raise EngineError(
                "the threads to share are another process's, from which this one was forked.",
                next_step='Start processes by multiprocessing.get_context("spawn").',
            )
        if count is not None and count != self._count:
            raise EngineError(
                "this process's sessions share another number of threads.",
                expected=f"threads={self._count or None}, as the first of them",
                found=f"threads={count}",
            )


_SHARED_THREADS = _SharedThreads()


class OnnxRuntimeGraph:
    """A step in ONNX Runtime, which reads numpy's memory and lends its own to the outputs."""

    def __init__(self, model: bytes | str, threads: Threads) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3  # errors only
        if threads.shared:
            _SHARED_THREADS.require(threads.number)
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = threads.number or 0
            options.inter_op_num_threads = 1
            spins = str(int(threads.spinning))
            options.add_session_config_entry("session.intra_op.allow_spinning", spins)
            # The threads of one step must not spin while the next one computes.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._run = session.run
        self.inputs: Sequence[str] = [value.name for value in session.get_inputs()]
        self.outputs: Sequence[str] = [value.name for value in session.get_outputs()]

    def run(self, arrays: dict[str, Array], outputs: Sequence[str]) -> Sequence[Array]:
        """Some outputs, from the arrays of all inputs."""
        results: Sequence[Array] = self._run(outputs, arrays)
        return results


class OpenVinoGraph:
    """A step in OpenVINO, which reads numpy's memory; outputs are copied."""

    def __init__(self, model: bytes | str, threads: Threads) -> None:
        import openvino

        # Processors with bfloat16 would compute in it by themselves: other numbers than PyTorch's.
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads.number is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads.number)
        core = openvino.Core()
        graph = core.read_model(model)
        # As they were written: where compiling removes operations, outputs have several names.
        self.inputs: Sequence[str] = [port.any_name for port in graph.inputs]
        self.outputs: Sequence[str] = [port.any_name for port in graph.outputs]
        self._compiled = core.compile_model(graph, "CPU", options)
        self._idle: list[Any] = []  # requests, each of which runs one call at a time

    def run(self, arrays: dict[str, Array], outputs: Sequence[str]) -> Sequence[Array]:
        """Some outputs, from the arrays of all inputs."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        results = request.infer(arrays, share_inputs=True)
        values = [results[self.outputs.index(name)] for name in outputs]
        self._idle.append(request)
        return values


ENGINES: dict[str, type[Graph]] = {"onnxruntime": OnnxRuntimeGraph, "openvino": OpenVinoGraph}
_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}  # of treeify, with the engine in it


@dataclass(frozen=True)
class Step:
    """A graph from some leaves to more.

    Args:
        files: its file, and perhaps that of its weights: name, sha256 and bytes.
        leaves: where it ends.
        logits: its outputs with leaf logits.
        inputs: the images and kept values that it reads.
        fetched: its outputs with leaf logits, and the values that later steps read.
        dropped: values that no later step reads.
    """

    files: tuple[dict[str, Any], ...]
    leaves: int
    logits: tuple[str, ...]
    inputs: tuple[str, ...]
    fetched: tuple[str, ...]
    dropped: tuple[str, ...]


def _read_step(model: Anytime, step: Step) -> bytes | str:
    """A step's graph, or its path if that leads to weights or nobody verifies it."""
    paths = [_check_file(model.path, entry, verify=model.verify) for entry in step.files]
    content: bytes | str = str(paths[0])
    for entry, path in zip(step.files, paths, strict=True) if model.verify else ():
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as part,
            ):
                read: bytes | mmap.mmap = bytes(part) if len(paths) == 1 else part
                found = hashlib.sha256(read).hexdigest()
        except (OSError, ValueError) as error:  # gone or emptied since it was looked at
            raise _damaged(path, f"SHA-256 {entry['sha256']}", _first_line(error)) from error
        if found != entry["sha256"]:
            raise _damaged(path, f"SHA-256 {entry['sha256']}", found)
        content = read if isinstance(read, bytes) else content
    return content


def _open_graph(model: Anytime, step: Step) -> Graph:
    """Open a step; ExportError where its files are not what was exported."""
    content, path = _read_step(model, step), model.path / step.files[0]["file"]
    again = "Copy it again from where it was exported, or export again."
    try:
        threads = Threads(model.threads, model.spinning, model.shared_threads)
        graph = ENGINES[model.engine](content, threads)
    except EngineError:
        raise
    except ImportError as error:
        extra = _EXTRAS[model.engine]
        raise EngineError(
            f"{model.engine} is not installed: {_first_line(error)}",
            next_step=f"pip install {model.engine}, or pip install 'treeify[{extra}]'.",
        ) from error
    except Exception as error:  # engines have errors of their own
        if "use_per_session_threads" in str(error):
            raise EngineError(
                "all sessions of ONNX Runtime in this process share threads.",
                found=_first_line(error),
                next_step="Pass shared_threads=True.",
            ) from error
        raise ExportError(
            f"{path} cannot be opened by {model.engine}.",
            found=_first_line(error),
            next_step=again,
        ) from error
    if set(graph.inputs) != set(step.inputs) or not set(step.fetched) <= set(graph.outputs):
        raise ExportError(
            f"{path} is not the step that {_MANIFEST} describes.",
            expected=f"inputs {', '.join(step.inputs)}; outputs {', '.join(step.fetched)}",
            found=f"inputs {', '.join(graph.inputs)}; outputs {', '.join(graph.outputs)}",
            next_step=again,
        )
    return graph


def _check_file(directory: Path, entry: Mapping[str, Any], *, verify: bool) -> Path:
    """The path of a step's file, which is there and in the directory itself."""
    path = directory / str(entry["file"])
    expected = f"{entry['bytes']:,} bytes"
    try:
        size = _check_regular(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, expected, _first_line(error)) from error
    if verify and size != entry["bytes"]:
        raise _damaged(path, expected, f"{size:,} bytes")
    return path


def _damaged(path: Path, expected: str, found: str) -> ExportError:
    return ExportError(
        f"{path} is missing, truncated or exchanged.",
        expected=f"{expected}, as it was exported",
        found=found,
        next_step="Copy it again from where it was exported, or export again.",
    )


_MANIFEST, _FORMAT, _VERSION = "ensemble.json", "treeify-export", 1


def _read_manifest(directory: Path) -> dict[str, Any]:
    """What ensemble.json holds; ExportError where that is not what this runtime reads."""
    path = directory / _MANIFEST
    if not os.path.lexists(path):
        raise ExportError(
            f"{directory} is no exported ensemble.",
            expected=f"a directory with {_MANIFEST}",
            found="no such file" if directory.is_dir() else "no such directory",
            next_step="Write one: treeify export DIR.",
        )
    try:
        values = _read_json(path)
        _check(values, {"format": _one_of(_FORMAT), "version": _counts(1)})
        if values["version"] == _VERSION:
            _check(values, _SCHEMA)
            _check(values, {"macs": {str(size): _counts(0) for size in values["sizes"]}})
            _check_lengths(values)
            _steps_of(values)
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{path} is damaged, or of no exported ensemble: {_first_line(error)}",
            next_step="Copy the directory again from where it was exported, or export again.",
        ) from error
    if values["version"] != _VERSION:
        raise ExportError(
            f"{path} is of another version.",
            expected=f"version {_VERSION}, which this runtime reads",
            found=f"version {values['version']}",
            next_step="Use the anytime.py that lies beside it, or export again.",
        )
    return dict(values)


def _steps_of(manifest: Mapping[str, Any]) -> tuple[list[Step], dict[str, int | None]]:
    """The steps, and the dim of every value in which images follow one another, if there is one."""
    rows = manifest["steps"]
    reads = [tuple(entry["name"] for entry in row["inputs"]) for row in rows]
    last_reader = {name: index for index, names in enumerate(reads) for name in names}
    batch_dims: dict[str, int | None] = {_IMAGES: 0}
    steps: list[Step] = []
    leaves = 0
    for index, row in enumerate(rows):
        what = f"step {index + 1}"
        kept = [entry for entry in row["outputs"] if entry["kind"] == "kept"]
        logits = tuple(entry["name"] for entry in row["outputs"] if entry["kind"] == "leaves")
        if not set(reads[index]) <= batch_dims.keys():
            raise ValueError(f"{what} reads what no step before it computes")
        names = [entry["name"] for entry in kept]
        if len({*names, *batch_dims, *logits}) != len(names) + len(batch_dims) + len(logits):
            raise ValueError(f"{what} computes what has been computed")
        if not row["start"] == leaves < row["leaves"]:
            raise ValueError(f"{what} goes from {row['start']} to {row['leaves']} leaves")
        if not logits or (steps and set(steps[0].logits) != set(logits)):
            raise ValueError(f"{what} has other outputs than the first one")
        for entry in kept:
            _check(entry, {"shape": [_is_dim]})
            _check(entry, {"batch_dim": (_counts(0, len(entry["shape"]) - 1),)})
            batch_dims[entry["name"]] = entry.get("batch_dim")
        files = (row, row["data"]) if row.get("data") else (row,)
        needed = [name for name in names if last_reader.get(name, -1) > index]
        gone = tuple(name for name in batch_dims if last_reader.get(name) == index)
        leaves, fetched = row["leaves"], (*logits, *needed)
        steps.append(Step(files, leaves, logits, reads[index], fetched, gone))
    if not steps or [step.leaves for step in steps] != manifest["sizes"]:
        raise ValueError("its sizes are not those where steps end")
    _check_structure(manifest.get("output"), steps[0].logits)
    return steps, batch_dims


def _check_lengths(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError where lists have not as many values as they should."""
    shape = manifest["images"]["shape"]
    if not shape or not all(isinstance(dim, int) for dim in shape[1:]):
        raise ValueError(f"its images have shape {shape}")
    for budget in manifest["budgets"]:
        if len(budget["thresholds"]) != len(budget["sizes"]) - 1:
            raise ValueError("a budget has no threshold for every size but the last")
    preparation = manifest.get("preparation") or {"size": (1, 1), "channels": 0}
    statistics = [preparation.get(key) for key in ("mean", "std")]
    lengths = {len(values) for values in statistics if values is not None}
    if len(preparation["size"]) != 2 or lengths - {preparation["channels"]}:
        raise ValueError("its preparation is of no images")


def _check_structure(structure: Any, logits: Sequence[str]) -> None:
    """Raise ValueError unless it is an output's structure of these tensors."""
    pairs = list(structure.items()) if isinstance(structure, dict) else []
    kind, content = pairs[0] if len(pairs) == 1 else ("", None)
    if kind == "dict" and isinstance(content, dict):
        kind, content = "list", list(content.values())
    if kind in ("tuple", "list") and isinstance(content, list):
        for part in content:
            _check_structure(part, logits)
    elif kind != "constant" and not (kind == "tensor" and content in logits):
        raise ValueError(f"its output has a part that is {_described(structure)}")


# How Pillow names pixels with so many channels, opened images, and turns by orientation in EXIF.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_OPENED = ("L", "LA", "RGB", "RGBA")
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258  # of TIFF
_SIXTEEN_BITS = ("PNG", "PPM")  # whose pixels of mode I go to 65,535


def _open_image(
    file: str | os.PathLike[str] | IO[bytes], preparation: Mapping[str, Any]
) -> NDArray[np.float32]:
    """An image file as floats `[C, H, W]`, bit for bit as `treeify.data` prepares it."""
    size, channels = preparation["size"], preparation["channels"]
    if channels not in _MODES:
        raise InputError(
            f"the ensemble takes inputs of shape {(channels, *size)}, not files of images.",
            expected="(C, H, W) with 1, 3 or 4 channels",
            next_step="Call model.predict(images) with an array.",
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise EngineError("image files need Pillow.", next_step="pip install pillow.") from error
    try:
        if isinstance(file, str | os.PathLike):
            _check_regular(Path(file), anywhere=True)
        with Image.open(file) as image:
            if image.format == "EPS":  # which goes to Ghostscript
                raise ValueError("it is a program for printers, not a picture")
            image.load()
            image = _fit(_upright(image).convert(_MODES[channels]), preparation)
    except Exception as error:  # a damaged file makes decoders raise anything
        raise InputError(
            f"an image cannot be read: {file}",
            expected="a file in a format that Pillow decodes, 8 or 16 bits per channel",
            found=_first_line(error),
        ) from error
    pixels = np.asarray(image).reshape(*size, channels).transpose(2, 0, 1)
    mean, std = (np.array(preparation[key], np.float32)[:, None, None] for key in ("mean", "std"))
    prepared: NDArray[np.float32] = pixels.astype(np.float32, order="C") / np.float32(255)
    return (prepared - mean) / std


def _upright(image: Any) -> Any:
    """A decoded image, turned as it says and of mode L, LA, RGB or RGBA."""
    from PIL import Image

    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged block says nothing of the orientation, and nothing of the pixels
        turn = None
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in _SIXTEEN_BITS):
        bits = int(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0])
        scaled = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    elif mode.startswith(("I", "F")):
        kind = "floats" if mode.startswith("F") else "integers of 32 bits"
        raise ValueError(f"pixels are {kind}, whose range is not known: save it with 8 or 16 bits")
    elif mode not in _OPENED:
        alpha = mode in ("PA", "RGBa", "La") or (mode == "P" and "transparency" in image.info)
        image = image.convert("RGBA" if alpha else "RGB")
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _fit(image: Any, preparation: Mapping[str, Any]) -> Any:
    """An image in the size of inputs: resized, then cropped or padded around its centre."""
    from PIL import Image, ImageOps

    crop_mode, (height, width) = preparation["crop_mode"], preparation["size"]
    full = [math.floor(side / preparation["crop_pct"]) for side in (height, width)]
    ratios = image.height / full[0], image.width / full[1]
    if crop_mode == "squash":
        new = full
    elif crop_mode == "center" and full[0] == full[1] and image.width <= image.height:
        new = [int(full[0] * image.height / image.width), full[1]]
    elif crop_mode == "center" and full[0] == full[1]:
        new = [full[0], int(full[1] * image.width / image.height)]
    else:
        ratio = max(ratios) if crop_mode == "border" else min(ratios)
        new = [round(image.height / ratio), round(image.width / ratio)]
    resampling = Image.Resampling[preparation["interpolation"].upper()]
    image = image.resize((new[1], new[0]), resampling)
    missing = max(0, width - image.width), max(0, height - image.height)
    if any(missing):
        border = crop_mode == "border"
        fill = tuple(round(255 * mean) if border else 0 for mean in preparation["mean"])
        before, after = ([(side + odd) // 2 for side in missing] for odd in (0, 1))
        image = ImageOps.expand(image, (*before, *after), fill)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _check_regular(path: Path, *, anywhere: bool = False) -> int:
    """The bytes of a file; OSError or ValueError if it is none, or a link out of its directory."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe, say, may have no end
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if not anywhere and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(f"a link that leads to {path.resolve()}")
    return status.st_size


_MOST_BYTES = 2**26  # of a JSON file
_MOST = 2**53  # of its integers: as far as every reader of JSON tells them apart


def _read_json(path: Path) -> Any:
    """The values in a file; OSError or ValueError where they cannot be had."""
    if _check_regular(path) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def _check(value: Any, schema: Any, where: str = "it") -> None:
    """Check values of JSON by a schema.

    A schema is a predicate, `{key: schema}` of an object, which may have more keys, `[schema]` of a
    list, or `(schema,)` of what may be null or missing.

    Raises:
        ValueError: they are not as it says.
    """
    if isinstance(schema, tuple):
        if value is not None:
            _check(value, schema[0], where)
    elif isinstance(schema, dict) and isinstance(value, dict):
        for key, part in schema.items():
            _check(value.get(key), part, f"{where}.{key}")
    elif isinstance(schema, list) and isinstance(value, list):
        for index, part in enumerate(value):
            _check(part, schema[0], f"{where}[{index}]")
    elif not callable(schema) or not schema(value):
        raise ValueError(f"{where.removeprefix('it.')} is {_described(value)}")


def _counts(least: int, most: int = _MOST) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _reals(least: float) -> Callable[[object], bool]:
    return lambda value: type(value) in (int, float) and least <= value < math.inf  # type: ignore[operator]


def _matching(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _one_of(*choices: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_dim(value: object) -> bool:
    return _counts(1)(value) or _matching(r"batch(\*\d+)?")(value)


_is_text = _matching("(?s).*")
_FILE = {
    "file": _matching("[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}"),
    "sha256": _matching("[0-9a-f]{64}"),
    "bytes": _counts(1),
}
_SCHEMA = {
    "name": _is_text,
    "classes": ([_is_text],),
    "preparation": (
        {
            "size": [_counts(1, 2**15)],
            "mean": ([_reals(-1e9)],),
            "std": ([_reals(1e-30)],),
            "channels": _counts(1),
            "crop_mode": _one_of("center", "squash", "border"),
            "crop_pct": _reals(1e-6),
            "interpolation": _one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        },
    ),
    "sizes": [_counts(1)],
    "images": {
        "shape": [_is_dim],
        "dtype": _one_of("float16", "float32", "float64", "uint8", "int64"),
    },
    "droppable": _is_flag,
    "budgets": [{"target_macs": _counts(0), "sizes": [_counts(1)], "thresholds": [_reals(0)]}],
    "steps": [
        {
            **_FILE,
            "data": (_FILE,),
            "start": _counts(0),
            "leaves": _counts(1),
            "inputs": [{"name": _is_text}],
            "outputs": [{"name": _is_text, "kind": _one_of("leaves", "kept")}],
        }
    ],
}
_MEASURED = {
    "situation": _is_text,
    "checksum": _is_text,
    "sizes": [_counts(1)],
    "opening": [_reals(0)],
    "repeats": _counts(1),
    "transitions": [[_counts(0)]],
    **{name: [_reals(0)] for name in _TABLES},
}


def _is_number(value: Any) -> bool:
    """Whether it is a real number; truth values and NaN are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(value == value)


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        found = _described(value)
        raise InputError(f"{name} is no value it may have.", expected=expected, found=found)


def _no_images(found: str) -> InputError:
    return InputError(
        "there are no images.",
        expected="at least one, of one pixel or more",
        found=found,
        next_step="Leave empty batches out.",
    )


def _described(value: object) -> str:
    """What an argument is, for a message: a short value itself, an array's shape, or a type."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, bool | int | float | str | bytes | list | dict | type(None)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    """What an error says first, without the file's name if the system says that."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0][:300]
