"""`treeify predict`: image files in, answers that get better out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from treeify.anytime.confidence import Budget, answer, thresholds_for
from treeify.anytime.deadline import Latencies, advance_until, find
from treeify.cli import images as image_files
from treeify.cli.options import Device, Json, SavedEnsemble, count, duration, numbers
from treeify.cli.saved import checkpoint_in, recipe_of
from treeify.cli.watched import Watched
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data.preparation import Preparation, read_files
from treeify.engine.plan import Situation
from treeify.errors import CheckpointError, DataError, InputError
from treeify.training.distributed import resolve_device


def predict(
    directory: SavedEnsemble,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Image files; one batch."),
    ],
    deadline: Annotated[
        float | None,
        duration(
            "--deadline",
            "Time from the call, once images are loaded: 20ms, 0.02s or 0.02 (seconds).",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Stop adding leaves to an image once its likeliest class is this probable.",
        ),
    ] = None,
    leaves: Annotated[
        int | None,
        typer.Option(min=1, help="Leaves to stop at; by default all."),
    ] = None,
    budget: Annotated[
        int | None,
        count(
            "--budget",
            "Mean MACs per image, such as 60M, that treeify calibrate chose thresholds for.",
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, one class name a line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to end with.")] = 5,
    mean: Annotated[
        Sequence[float] | None,
        numbers("--mean", "Of the channels, pixels in 0 to 1, if not what is known."),
    ] = None,
    std: Annotated[Sequence[float] | None, numbers("--std", "Likewise.", positive=True)] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Classify images, with answers that get better while there is time.

    Without a limit all leaves answer in the end. A deadline needs to know how long steps take for
    as many images on this machine: the first call measures it, and keeps it with the ensemble.

    For example:

        treeify predict runs/digits_hne digit.png

        treeify predict my_ensemble photos/*.jpg --deadline 20ms

        treeify predict my_ensemble photo.jpg --confidence 0.9 --labels classes.txt --json
    """
    limit = _limit(leaves, deadline, confidence, budget)
    path = checkpoint_in(directory)
    console = Console(quiet=as_json)
    preparation = image_files.preparation(path, checkpoint.read_config(path), mean, std)
    with console.status("reading"):
        batch = read_files(images, preparation)
        names = None if labels is None else _read_labels(labels)
        hne = checkpoint.load(path).to(resolve_device(device))
    like = next(hne.parameters())
    x = batch.to(like.device, like.dtype)
    call = _Call(hne, x, path, limit, notes=[f"Images: {preparation}."])
    with console.status("warming up"):
        classes = call.prepare()
    names = _labels(names, classes, hne, path, call.notes)
    display = _Display([str(file) for file in images], names, min(top, classes))
    if as_json:
        call.run()
        typer.echo(json.dumps(_as_json(call, display, preparation), indent=2))
        return
    # Drawing would eat into a deadline, and cannot grow where nothing is redrawn.
    if console.is_terminal and limit.deadline is None:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            call.run(lambda watched: live.update(display.answers(watched), refresh=True))
    else:
        call.run()
    console.print(display.answers(call.watched, call.used))
    console.print(display.best(call.watched, call.used))
    for line in (*call.notes, *call.summary()):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class _Limit:
    """What ends an answer, at most one of them.

    Args:
        leaves: how many.
        deadline: seconds.
        confidence: probability that suffices.
        budget: mean MACs per image.
    """

    leaves: int | None = None
    deadline: float | None = None
    confidence: float | None = None
    budget: int | None = None


def _limit(
    leaves: int | None, deadline: float | None, confidence: float | None, budget: int | None
) -> _Limit:
    options = {
        "--leaves": leaves,
        "--deadline": deadline,
        "--confidence": confidence,
        "--budget": budget,
    }
    given = [option for option, value in options.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were given.", expected="one of them")
    return _Limit(leaves, deadline, confidence, budget)


def _read_labels(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--labels {str(file)!r} cannot be read: {error}",
            expected="a UTF-8 text file, one class name a line",
        ) from error


def _labels(
    given: list[str] | None, classes: int, hne: HierarchicalEnsemble, path: Path, notes: list[str]
) -> list[str] | None:
    """A name for every class, or None to go by their indices."""
    if given is not None:
        if len(given) != classes:
            raise DataError(
                "--labels do not fit the ensemble.",
                expected=f"{classes} lines, a class name each",
                found=f"{len(given)}",
            )
        return given
    own = hne.architecture is None or ":" in hne.architecture.name or recipe_of(path)
    if classes != 1000 or own:
        return None
    notes.append("Labels: ImageNet-1k's, as the architecture has 1,000 classes (else --labels).")
    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(classes)]


@dataclass
class _Call:
    """One call of the ensemble on one batch.

    Args:
        hne: the ensemble.
        x: the batch, `[N, C, H, W]`.
        path: where the ensemble is saved.
        limit: what ends the answer.
        notes: what the user should know.
    """

    hne: HierarchicalEnsemble
    x: Tensor
    path: Path
    limit: _Limit
    notes: list[str]
    watched: Watched = field(init=False)
    used: list[int] = field(init=False, default_factory=list)
    measured: bool = field(init=False, default=False)

    def prepare(self) -> int:
        """Do what need not happen against the clock; return the number of classes `K`."""
        hne, limit = self.hne, self.limit
        if limit.leaves is not None:
            hne.tree.check_size(limit.leaves)
        if limit.budget is not None:
            self._budget()
        if limit.deadline is not None:
            self._latencies()
        # The first calls of a process set up kernels and take longer than any later one.
        session = hne.session(torch.zeros_like(self.x))
        for size in self._sizes():
            session.advance(to=size)
        if not isinstance(session.logits, Tensor) or session.logits.ndim != 2:
            raise InputError("the ensemble returns no single tensor of logits.", expected="[N, K]")
        return session.logits.shape[1]

    def run(self, show: Callable[[Watched], None] = lambda watched: None) -> None:
        """Prediction, remembering every step."""
        hne, limit, images = self.hne, self.limit, len(self.x)
        latencies = None if limit.deadline is None else self._latencies()
        begin = time.perf_counter()
        watched = self.watched = Watched(images, begin, show)
        session = hne.session(self.x)
        if limit.deadline is not None and latencies is not None:
            advance_until(session, latencies, limit.deadline, begin, observe=watched.take)
        elif limit.confidence is not None or limit.budget is not None:
            wanted = self._budget() if limit.confidence is None else limit.confidence
            sizes = hne.tree.nested_sizes
            found = answer(session, sizes, thresholds_for(wanted, sizes), observe=watched.take)
            self.used = found.leaves.tolist()
        else:
            for size in self._sizes():
                watched.take(session.advance(to=size))
        self.used = self.used or [self.watched.told[-1].step.leaves] * images

    @property
    def seconds(self) -> float:
        """From the call to its last answer."""
        return self.watched.told[-1].seconds

    @property
    def met(self) -> bool | None:
        """Whether the deadline was met; None without one."""
        return None if self.limit.deadline is None else self.seconds <= self.limit.deadline

    @property
    def macs(self) -> float:
        """Mean MACs per image of the leaves used."""
        return sum(map(self.hne.count_macs, self.used)) / len(self.used)

    def summary(self) -> list[str]:
        """What became of the limit."""
        leaves = sum(self.used) / len(self.used)
        word = "leaf" if leaves == 1 else "leaves"
        mean = f"{leaves:.4g} {word} and {self.macs:,.0f} MACs per image"
        if self.limit.deadline is not None:
            end = f"answered after {1e3 * self.seconds:.2f} ms with {mean}"
            verdict = "met" if self.met else "missed"
            return [f"Deadline of {1e3 * self.limit.deadline:g} ms {verdict}: {end}."]
        if self.limit.confidence is not None:
            return [f"Confidence {self.limit.confidence:g}: {mean} on average."]
        if self.limit.budget is not None:
            return [f"Budget of {self.limit.budget:,} MACs: {mean} on average."]
        return []

    def _sizes(self) -> list[int]:
        """The nested sizes on the way, and the size to end with."""
        last = self.hne.leaves if self.limit.leaves is None else self.limit.leaves
        return [*(size for size in self.hne.tree.nested_sizes if size < last), last]

    def _budget(self) -> Budget:
        budgets, wanted = self.hne.budgets, self.limit.budget
        if wanted in budgets:
            return budgets[wanted]
        raise InputError(
            f"no thresholds are saved for a budget of {wanted:,} MACs per image.",
            expected=f"one of {', '.join(f'{known:,}' for known in sorted(budgets))}"
            if budgets
            else "a budget that was calibrated",
            found=None if budgets else "none, no budget has been calibrated",
            next_step=f"Choose them: treeify calibrate {self.path} --target-macs {wanted}",
        )

    def _latencies(self) -> Latencies:
        """How long steps take for this batch, measured if that is not known."""
        hne, x = self.hne, self.x
        situation = Situation.of(x, training=False)
        try:
            return find(hne.latencies, situation, hne.plan(x))
        except InputError:
            found = hne.calibrate(x)
        self.measured = True
        try:
            checkpoint.save_measurements(hne, self.path)
            kept = f"kept in {self.path}"
        except CheckpointError as error:
            kept = f"not kept: {str(error).splitlines()[0].rstrip('.')}"
        self.notes.append(
            f"Latencies of {situation} were not known: measured in {found.repeats} rounds, {kept}."
        )
        return found


@dataclass(frozen=True)
class _Display:
    """Answers as tables and as JSON.

    Args:
        files: the images.
        labels: names of the classes, if known.
        top: how many classes to end with.
    """

    files: list[str]
    labels: list[str] | None
    top: int

    def answers(self, watched: Watched, used: Sequence[int] | None = None) -> Table:
        """A row for every image and step so far."""
        table = Table(caption="ms since the call; MACs per image")
        if several := len(self.files) > 1:
            table.add_column("image", overflow="fold")
        for heading in ("leaves", "ms", "MACs"):
            table.add_column(heading, justify="right")
        table.add_column("class")
        table.add_column("probability %", justify="right")
        for image, file in enumerate(self.files):
            rows = self.steps(watched, image, used)
            for row in rows:
                table.add_row(
                    *([Text(file if row is rows[0] else "")] if several else []),
                    str(row["leaves"]),
                    f"{row['elapsed_ms']:.2f}",
                    f"{row['macs']:,}",
                    Text(self._name(row["class"])),
                    f"{100 * row['probability']:.1f}",
                    end_section=row is rows[-1],
                )
        return table

    def best(self, watched: Watched, used: Sequence[int]) -> Table:
        """The likeliest classes of every image."""
        table = Table(caption="by all leaves used")
        if several := len(self.files) > 1:
            table.add_column("image", overflow="fold")
        table.add_column("leaves", justify="right")
        table.add_column("class")
        table.add_column("probability %", justify="right")
        for image, (file, leaves) in enumerate(zip(self.files, used, strict=True)):
            rows = self.likeliest(watched, image, leaves)
            for row in rows:
                first = row is rows[0]
                table.add_row(
                    *([Text(file if first else "")] if several else []),
                    str(leaves) if first else "",
                    Text(self._name(row["class"])),
                    f"{100 * row['probability']:.1f}",
                    end_section=row is rows[-1],
                )
        return table

    def steps(
        self, watched: Watched, image: int, used: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """What one image was told until it was answered, ready for JSON."""
        rows = []
        for told in watched.told:
            found = told.of(image)
            if found is None or (used is not None and told.step.leaves > used[image]):
                continue
            step = {
                "leaves": told.step.leaves,
                "elapsed_ms": 1e3 * told.seconds,
                "macs": told.step.macs,
            }
            rows.append(step | self._class(found, int(found.argmax())))
        return rows

    def likeliest(self, watched: Watched, image: int, leaves: int) -> list[dict[str, Any]]:
        """The likeliest classes of one image, ready for JSON."""
        last = next(told for told in watched.told if told.step.leaves == leaves)
        found = last.of(image)
        assert found is not None
        return [self._class(found, index) for index in found.topk(self.top).indices.tolist()]

    def _class(self, probabilities: Tensor, index: int) -> dict[str, Any]:
        return {
            "class": index,
            "label": self.labels[index] if self.labels else None,
            "probability": probabilities[index].item(),
        }

    def _name(self, index: int) -> str:
        return self.labels[index] if self.labels else str(index)


def _as_json(call: _Call, display: _Display, preparation: Preparation) -> dict[str, Any]:
    limit, watched = call.limit, call.watched
    return {
        "ensemble": str(call.path),
        "device": str(call.x.device),
        "input": list(preparation.shape),
        "mean": list(preparation.mean),
        "std": list(preparation.std),
        "normalisation": preparation.source,
        "leaves": limit.leaves,
        "confidence": limit.confidence,
        "budget": limit.budget,
        "deadline_ms": None if limit.deadline is None else 1e3 * limit.deadline,
        "elapsed_ms": 1e3 * call.seconds,
        "deadline_met": call.met,
        "measured_latencies": call.measured,
        "macs": call.macs,
        "notes": call.notes,
        "images": [
            {
                "path": file,
                "leaves": leaves,
                "answers": display.steps(watched, image, call.used),
                "top": display.likeliest(watched, image, leaves),
            }
            for image, (file, leaves) in enumerate(zip(display.files, call.used, strict=True))
        ],
    }
