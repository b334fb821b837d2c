"""Real training runs, seconds long, on a sixth of the digits."""

import json
import math
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

import treeify
from treeify import data, losses, trainer
from treeify.cli.eval import evaluate
from treeify.cli.train import train as train_command
from treeify.errors import CheckpointError, DataError, RecipeError
from treeify.metrics import evaluate as measure
from treeify.recipe import LossRecipe, OptimizerRecipe, Recipe, ScheduleRecipe, load_recipe
from treeify.trainer import DivergedError, Epoch, Plan, Reporter, Step, lr_factor, train

RECIPE = """\
name: tiny
model:
  name: treeify.models:cifar_resnet50
  kwargs: {num_classes: 10, width: 0.25, layers: [1, 1, 1, 1]}
  splits: [block3, block4]
data: {name: digits, held_out: 1497}
loss: {name: hierarchical_distillation}
optimizer: {lr: 0.05}
schedule: {epochs: 2}
batch_size: 100
"""
STEPS = 3  # per epoch: 300 training images

app = typer.Typer()
app.command("train")(train_command)
app.command("eval")(evaluate)


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


class Recorder(Reporter):
    def __init__(self) -> None:
        self.events: list[Plan | Step | Epoch] = []
        self.started = self.stepped = self.finished_epoch = self.events.append

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


class InterruptAt(Reporter):
    """Presses Ctrl-C after some step of the run."""

    def __init__(self, step: int) -> None:
        self.left = step

    def stepped(self, step: Step) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_a_run_leaves_everything_behind(recipe: Recipe) -> None:
    recorder = Recorder()
    result = train(recipe, reporter=recorder)
    directory = Path("runs/tiny")
    assert result.plan.directory == directory
    assert not result.interrupted
    assert sorted(path.name for path in directory.iterdir()) == [
        "best",
        "environment.json",
        "last",
        "metrics.jsonl",
        "recipe.yaml",
    ]
    assert load_recipe(directory / "recipe.yaml") == recipe
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["device"] == str(result.plan.device)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, STEPS), (2, 2 * STEPS)]
    assert [score["leaves"] for score in lines[-1]["held_out"]] == [1, 2, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    plan, *events = recorder.events
    assert isinstance(plan, Plan)
    kinds = [type(event) for event in events]
    assert kinds == 2 * [*STEPS * [Step], Epoch]
    assert recorder.of(Epoch)[-1] == result.last
    assert [step.step for step in recorder.of(Step)] == 2 * [1, 2, 3]


def test_checkpoints_load_and_score_as_recorded(recipe: Recipe) -> None:
    result = train(recipe)
    batches = [next(iter(data.loader(recipe.data.load().held_out, 2000, shuffle=False)))]
    loaded = treeify.load(result.plan.directory / "last")
    for score, expected in zip(measure(loaded, batches), result.last.held_out, strict=True):
        assert (score.leaves, score.accuracy) == (expected.leaves, expected.accuracy)
    images = batches[0][0][:5]
    assert_close(loaded(images), result.plan.hne.eval()(images))


def test_a_checkpoint_holds_the_trainers_state(recipe: Recipe) -> None:
    last = train(recipe).plan.directory / "last"
    assert {path.suffix for path in last.iterdir()} == {".safetensors", ".json"}
    counters = json.loads((last / "trainer.json").read_text())
    assert (counters["epoch"], counters["step"]) == (2, 2 * STEPS)
    tensors = load_file(last / "optimizer.safetensors")
    momenta = {name.removeprefix("momentum_buffer.") for name in tensors if "momentum" in name}
    parameters = dict(treeify.load(last).named_parameters())
    assert momenta == set(parameters)
    for name in momenta:
        assert tensors[f"momentum_buffer.{name}"].shape == parameters[name].shape
    torch.Generator().set_state(tensors["rng.order"])
    torch.Generator().set_state(tensors["rng.torch"])


def test_best_is_the_epoch_with_the_highest_accuracy(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = trainer.evaluate
    accuracies = iter([50.0, 20.0])

    def falling(*args, **kwargs):
        *others, last = measured(*args, **kwargs)
        return (*others, type(last)(last.leaves, next(accuracies), last.nll))

    monkeypatch.setattr(trainer, "evaluate", falling)
    directory = train(recipe).plan.directory
    epochs = [json.loads((directory / n / "trainer.json").read_text()) for n in ("best", "last")]
    assert [counters["epoch"] for counters in epochs] == [1, 2]


def test_the_same_seed_gives_the_same_weights(recipe: Recipe) -> None:
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"flip": True})})
    first, second = (weights(train(recipe).plan.directory / "last") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = weights(train(recipe.model_copy(update={"seed": 1})).plan.directory / "last")
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_run_directories_are_numbered(recipe: Recipe) -> None:
    short = recipe.model_copy(update={"schedule": ScheduleRecipe(epochs=1)})
    names = [train(short).plan.directory for _ in range(3)]
    assert names == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]


@pytest.mark.parametrize(("step", "epochs"), [(2, 0), (STEPS + 1, 1)])
def test_ctrl_c_finishes_the_step_and_saves(recipe: Recipe, step: int, epochs: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    result = train(recipe, reporter=InterruptAt(step))
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted
    assert (result.last.epoch if result.last else 0) == epochs
    last = result.plan.directory / "last"
    assert json.loads((last / "trainer.json").read_text())["step"] == step
    images = torch.zeros(2, 3, 8, 8)
    assert_close(treeify.load(last)(images), result.plan.hne.eval()(images))


def test_a_second_ctrl_c_acts_at_once(recipe: Recipe) -> None:
    class Twice(Reporter):
        def stepped(self, step: Step) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, reporter=Twice())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_loss_is_an_error_and_keeps_the_last_state(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    calls = []

    def exploding(logits, target, tree):
        calls.append(None)
        return logits.sum() * (value if len(calls) > STEPS else 1e-3)

    monkeypatch.setitem(losses.LOSSES, "exploding", exploding)
    recipe = recipe.model_copy(update={"loss": LossRecipe(name="exploding")})
    with pytest.raises(DivergedError, match=f"(?s){value}.* in epoch 2, step 1.*last"):
        train(recipe)
    state = json.loads(Path("runs/tiny/last/trainer.json").read_text())
    assert state["step"] == STEPS
    assert all(torch.isfinite(tensor).all() for tensor in weights(Path("runs/tiny/last")).values())


def test_channels_last_trains_to_the_same_weights(recipe: Recipe) -> None:
    """Up to rounding, which training amplifies: one epoch at a small rate."""
    gentle = {"schedule": ScheduleRecipe(epochs=1), "optimizer": OptimizerRecipe(lr=1e-3)}
    small = recipe.model_copy(update=gentle)
    plain, last = (
        weights(train(small.model_copy(update={"channels_last": on})).plan.directory / "last")
        for on in (False, True)
    )
    for key, tensor in plain.items():
        assert_close(last[key], tensor, rtol=1e-2, atol=1e-3)


def test_threads_are_put_back(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    train(recipe.model_copy(update={"threads": 1, "schedule": ScheduleRecipe(epochs=1)}))
    assert counts == [2, 1, 2]


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("model.kwargs.num_classes=100", RecipeError, r"10 classes(?s:.)*one with 100"),
        ("data.held_out=3", DataError, "cannot be held out"),
        ("device=cuda:7", RecipeError, "cuda:7"),
        ("out=.", CheckpointError, "new or empty"),
        ("out=tiny.yaml", CheckpointError, "new or empty"),
    ],
)
def test_nothing_is_written_for_bad_input(
    recipe_file: Path, override: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        train(load_recipe(recipe_file, [override]))
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_overwrite_replaces_the_run_and_nothing_else(recipe: Recipe) -> None:
    out = Path("mine")
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    (out / "metrics.jsonl").write_text("old\n")
    with pytest.raises(CheckpointError):
        train(recipe, out=out)
    train(recipe, out=out, overwrite=True)
    assert (out / "notes.txt").read_text() == "keep me"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_learning_rate_warms_up_then_follows_half_a_cosine() -> None:
    factors = [lr_factor(step, steps=100, warmup=10) for step in range(101)]
    assert factors[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert lr_factor(0, steps=100, warmup=0) == 1


def test_each_step_uses_its_own_learning_rate(recipe: Recipe) -> None:
    recorder = Recorder()
    train(recipe, reporter=recorder)
    expected = [0.05 * lr_factor(step, steps=2 * STEPS, warmup=0) for step in range(2 * STEPS)]
    assert [step.lr for step in recorder.of(Step)] == pytest.approx(expected)


def test_the_commands_print_plain_tables(recipe_file: Path) -> None:
    runner = CliRunner()
    trained = runner.invoke(app, ["train", str(recipe_file), "schedule.epochs=1", "--out", "here"])
    assert trained.exit_code == 0, trained.output
    assert "\x1b" not in trained.output
    for text in ("epoch 1/1", "accuracy %", "MACs", "parameters", "1,497 of 1,797", "here"):
        assert text in trained.output, text
    shown = runner.invoke(app, ["eval", "here", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    line = json.loads(Path("here/metrics.jsonl").read_text())
    for row, expected in zip(found["scores"], line["held_out"], strict=True):
        assert row["leaves"] == expected["leaves"]
        assert row["accuracy"] == pytest.approx(expected["accuracy"])
        assert row["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    macs, parameters = ([row[key] for row in found["scores"]] for key in ("macs", "parameters"))
    assert macs == sorted(set(macs))
    hne = treeify.load("here/best")
    assert parameters[-1] == sum(parameter.numel() for parameter in hne.parameters())


def test_eval_takes_checkpoints_and_other_data(recipe_file: Path) -> None:
    runner = CliRunner()
    runner.invoke(app, ["train", str(recipe_file), "schedule.epochs=1", "--out", "here"])
    best = runner.invoke(app, ["eval", "here/best", "--data", "held_out=500"])
    assert best.exit_code == 0, best.output
    assert "500 of 1,797" in best.output
    treeify.save(treeify.load("here/last"), "saved")
    assert isinstance(runner.invoke(app, ["eval", "saved"]).exception, RecipeError)
    assert isinstance(runner.invoke(app, ["eval", "nowhere"]).exception, CheckpointError)
    other = runner.invoke(app, ["eval", "saved", "--data", "name=digits", "--json"])
    assert json.loads(other.output)["split"].startswith("360 of 1,797")


def test_ctrl_c_ends_the_command_with_130(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer._Run._step

    def interrupting(self, *args):
        signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(trainer._Run, "_step", interrupting)
    stopped = CliRunner().invoke(app, ["train", str(recipe_file)])
    assert stopped.exit_code == 130
    assert "the state is saved in runs/tiny/last" in stopped.output
    assert treeify.load("runs/tiny/last").leaves == 4


def test_the_resolved_recipe_states_every_option(recipe: Recipe) -> None:
    short = recipe.model_copy(update={"schedule": ScheduleRecipe(epochs=1)})
    written = yaml.safe_load((train(short).plan.directory / "recipe.yaml").read_text())
    assert written["loss"] == {
        "name": "hierarchical_distillation",
        "alpha": 0.5,
        "temperature": 2.0,
        "scale_by_t2": False,
    }
    assert written["data"]["split_seed"] == 0
