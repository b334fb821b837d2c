"""Real training runs, seconds long, on a sixth of the digits."""

import csv
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import runs
import small
import torch
import typer
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.benchmark import Timer
from typer.testing import CliRunner

import treeify
from treeify import losses
from treeify.cli.eval import evaluate
from treeify.cli.train import train as train_command
from treeify.data import digits
from treeify.errors import CheckpointError, DataError, RecipeError
from treeify.evaluation.cost import costs
from treeify.evaluation.metrics import measure
from treeify.training import state_file, trainer
from treeify.training.events import Epoch, Reporter, RunSize, Step
from treeify.training.loaders import held_out_loader
from treeify.training.recipe import LossRecipe, OptimizerRecipe, Recipe, ScheduleRecipe
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import DivergedError, train

STEPS = 3  # per epoch: 300 training images

app = typer.Typer()
app.command("train")(train_command)
app.command("eval")(evaluate)


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(runs.RECIPE)
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


class Recorder(Reporter):
    def __init__(self) -> None:
        self.events: list[RunSize | Step | Epoch] = []
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
    assert result.run.directory == directory
    assert not result.interrupted
    assert sorted(path.name for path in directory.iterdir()) == [
        "best",
        "checkpoints",
        "environment.json",
        "last",
        "metrics.jsonl",
        "recipe.yaml",
    ]
    assert load_recipe(directory / "recipe.yaml") == recipe
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["device"] == str(result.run.device)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, STEPS), (2, 2 * STEPS)]
    assert [score["leaves"] for score in lines[-1]["held_out"]] == [1, 2, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    run, *events = recorder.events
    assert isinstance(run, RunSize)
    kinds = [type(event) for event in events]
    assert kinds == 2 * [*STEPS * [Step], Epoch]
    assert recorder.of(Epoch)[-1] == result.last
    assert [step.step for step in recorder.of(Step)] == 2 * [1, 2, 3]


def test_checkpoints_load_and_score_as_recorded(recipe: Recipe) -> None:
    result = train(recipe)
    batches = list(held_out_loader(recipe.data.load().held_out, 2000))
    loaded = treeify.load(result.run.directory / "last")
    for found, expected in zip(
        measure(loaded, batches).result(), result.last.held_out, strict=True
    ):
        assert (found.leaves, found.accuracy) == (expected.leaves, expected.accuracy)
    images = batches[0][0][:5]
    assert_close(loaded(images), result.run.hne.eval()(images))


def test_a_checkpoint_holds_the_trainers_state(recipe: Recipe) -> None:
    last = train(recipe).run.directory / "last"
    assert {path.suffix for path in last.iterdir()} == {".safetensors", ".json"}
    state = state_file.read_state(last)
    assert (state["epochs"], state["step"]) == (2, 2 * STEPS)
    parameters = list(treeify.load(last).parameters())
    momenta = [own["momentum_buffer"] for own in state["optimizer"]["state"].values()]
    assert [own.shape for own in momenta] == [own.shape for own in parameters]


def test_best_is_the_epoch_with_the_highest_accuracy(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = trainer.measure
    shares = iter([0.5, 0.2])

    def falling(*args, **kwargs):
        scores = measured(*args, **kwargs)
        scores.state_dict()["correct"][-1] = scores.images * next(shares)
        return scores

    monkeypatch.setattr(trainer, "measure", falling)
    directory = train(recipe).run.directory
    states = [state_file.read_state(directory / name) for name in ("best", "last")]
    assert [state["epochs"] for state in states] == [1, 2]


def test_the_same_seed_gives_the_same_weights(recipe: Recipe) -> None:
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"flip": True})})
    first, second = (weights(train(recipe).run.directory / "last") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = weights(train(recipe.model_copy(update={"seed": 1})).run.directory / "last")
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_run_directories_are_numbered(recipe: Recipe) -> None:
    short = recipe.model_copy(update={"schedule": ScheduleRecipe(epochs=1)})
    names = [train(short).run.directory for _ in range(3)]
    assert names == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]


@pytest.mark.parametrize(("step", "epochs"), [(2, 0), (STEPS + 1, 1)])
def test_ctrl_c_finishes_the_step_and_saves(recipe: Recipe, step: int, epochs: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    result = train(recipe, reporter=InterruptAt(step))
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted
    assert (result.last.epoch if result.last else 0) == epochs
    last = result.run.directory / "last"
    assert state_file.read_state(last)["step"] == step
    images = torch.zeros(2, 3, 8, 8)
    assert_close(treeify.load(last)(images), result.run.hne.eval()(images))


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
    assert state_file.read_state(Path("runs/tiny/last"))["step"] == STEPS
    assert all(torch.isfinite(tensor).all() for tensor in weights(Path("runs/tiny/last")).values())


def test_channels_last_trains_to_the_same_weights(recipe: Recipe) -> None:
    """Up to rounding, which training amplifies: one epoch at a small rate."""
    gentle = {"schedule": ScheduleRecipe(epochs=1), "optimizer": OptimizerRecipe(lr=1e-3)}
    slow = recipe.model_copy(update=gentle)
    plain, last = (
        weights(train(slow.model_copy(update={"channels_last": on})).run.directory / "last")
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


def test_a_model_that_returns_more_than_logits_is_refused() -> None:
    class Pair(small.SmallNet):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            logits = super().forward(x)
            return logits, logits

    hne = treeify.hierarchicalize(Pair(10), ["stage1"], example_input=small.EXAMPLE)
    with pytest.raises(RecipeError, match=r"does not return logits(?s:.)*tuple"):
        trainer.check_classes(hne, digits())


def test_counting_classes_leaves_frozen_batch_norms_frozen() -> None:
    hne = treeify.hierarchicalize(
        small.SmallNet(10), ["stage1"], example_input=small.EXAMPLE
    ).train()
    norm = hne.get_submodule("stem.1").eval()
    trainer.check_classes(hne, digits())
    assert hne.training
    assert not norm.training


def test_overwrite_replaces_the_run_and_nothing_else(recipe: Recipe) -> None:
    out = Path("mine")
    out.mkdir()
    (out / "recipe.yaml").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no run"):
        train(recipe, out=out, overwrite=True)
    assert (out / "recipe.yaml").read_text() == "mine"
    (out / "recipe.yaml").unlink()
    train(recipe, out=out)
    (out / "notes.txt").write_text("keep me")
    (out / "metrics.jsonl").write_text("old\n")
    with pytest.raises(CheckpointError):
        train(recipe, out=out)
    wrong = recipe.optimizer.model_copy(update={"options": {"no_such": 1}})
    with pytest.raises(RecipeError):
        train(recipe.model_copy(update={"optimizer": wrong}), out=out, overwrite=True)
    assert (out / "metrics.jsonl").read_text() == "old\n"
    train(recipe, out=out, overwrite=True)
    assert (out / "notes.txt").read_text() == "keep me"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_each_step_uses_its_own_learning_rate(recipe: Recipe) -> None:
    recorder = Recorder()
    schedule = ScheduleRecipe(epochs=4, warmup_epochs=1, warmup_lr=0.01)
    train(recipe.model_copy(update={"schedule": schedule}), reporter=recorder)
    found = [step.lr for step in recorder.of(Step)]
    warming = [0.01 + 0.04 * step / STEPS for step in range(STEPS)]
    cosine = [
        0.025 * (1 + math.cos(math.pi * step / (4 * STEPS))) for step in range(STEPS, 4 * STEPS)
    ]
    assert found == pytest.approx([*warming, *cosine])


def test_a_schedule_or_optimizer_of_timm_is_used_by_name(recipe: Recipe) -> None:
    recorder = Recorder()
    schedule = ScheduleRecipe(
        name="multistep", epochs=3, options={"decay_milestones": [1, 2], "decay_rate": 0.1}
    )
    rule = OptimizerRecipe(
        name="lamb", lr=1e-3, options={"betas": [0.8, 0.9]}, filter_bias_and_bn=True, clip_grad=1.0
    )
    train(recipe.model_copy(update={"schedule": schedule, "optimizer": rule}), reporter=recorder)
    lrs = [step.lr for step in recorder.of(Step)][::STEPS]
    assert lrs == pytest.approx([1e-3, 1e-4, 1e-5])
    groups = state_file.read_state(Path("runs/tiny/last"))["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0, 5e-4]
    assert groups[0]["betas"] == [0.8, 0.9]


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("optimizer.options={no_such: 1}", "optimizer 'momentum' cannot be made.*no_such"),
        ("schedule.options={no_such: 1}", "schedule 'cosine' cannot be made.*no_such"),
        ("trackers=[tensorbored]", "this run cannot be set up.*tensorbored"),
    ],
)
def test_options_timm_or_accelerate_does_not_know(
    recipe_file: Path, override: str, match: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){match}"):
        train(load_recipe(recipe_file, [override]))
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]
    with pytest.raises(RecipeError, match="no second derivatives"):
        load_recipe(recipe_file, ["optimizer.name=adahessian"])


def test_smoothed_labels_alone(recipe_file: Path) -> None:
    plain = train(load_recipe(recipe_file), out="plain").last
    smooth = train(load_recipe(recipe_file, ["mix={label_smoothing: 0.2}"]), out="smooth").last
    assert plain is not None and smooth is not None
    assert smooth.loss > plain.loss


def test_losses_of_ones_own_and_ramps(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(recipe_file.parent)
    (recipe_file.parent / "own_losses.py").write_text(
        "from torch.nn import functional as F\n\n"
        "seen = []\n\n\n"
        "class Weighted:\n"
        "    def __init__(self, *, weight: float = 1.0):\n"
        "        self.weight = weight\n\n"
        "    def __call__(self, logits, target, tree):\n"
        "        seen.append(self.weight)\n"
        "        return self.weight * F.cross_entropy(logits.mean(1), target)\n"
    )
    ramp = "loss.ramps={weight: {start: 1.0, stop: 2.0, epochs: 1}}"
    recipe = load_recipe(recipe_file, ["loss.name=own_losses:Weighted", ramp])
    train(recipe)
    import own_losses

    assert own_losses.seen == pytest.approx([1, 4 / 3, 5 / 3, 2, 2, 2])
    for override, match in (
        ("loss.ramps={wait: {start: 1.0, stop: 2.0, epochs: 1}}", "not of 'wait'"),
        ("loss.name=own_losses:Missing", "cannot be imported"),
        ("loss.wait=1.0", "did you mean 'weight'"),
    ):
        with pytest.raises(RecipeError, match=match):
            load_recipe(recipe_file, ["loss.name=own_losses:Weighted", override])


def test_an_ensemble_can_be_the_teacher(recipe: Recipe, recipe_file: Path) -> None:
    train(recipe, out="old")
    plain = train(recipe, out="plain").last
    taught = train(load_recipe(recipe_file, ["teacher={name: old, weight: 3.0}"]), out="taught")
    assert plain is not None and taught.last is not None
    assert taught.last.loss > plain.loss
    assert not torch.equal(
        weights(Path("plain/last"))["head.weight"], weights(Path("taught/last"))["head.weight"]
    )
    with pytest.raises(treeify.errors.ModelError):
        train(load_recipe(recipe_file, ["teacher={name: no_such_model}"]), out="third")


def test_a_moving_average_is_measured_and_saved(recipe: Recipe, recipe_file: Path) -> None:
    result = train(load_recipe(recipe_file, ["ema={decay: 0.5}"]))
    directory = result.run.directory
    averaged = treeify.load(directory / "last" / "ema")
    batches = list(held_out_loader(recipe.data.load().held_out, 2000))
    assert result.last is not None
    found = [own.accuracy for own in measure(averaged, batches).result()]
    assert found == [own.accuracy for own in result.last.held_out]
    raw = treeify.load(directory / "last").state_dict()
    assert not torch.equal(raw["head.weight"], averaged.state_dict()["head.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_train(recipe_file: Path, precision: str) -> None:
    usual = train(load_recipe(recipe_file), out="usual").last
    result = train(load_recipe(recipe_file, [f"precision={precision}"]))
    assert usual is not None and result.last is not None
    assert result.last.loss != usual.loss
    assert result.last.loss == pytest.approx(usual.loss, rel=0.1 if precision == "bf16" else 1e-3)
    dtype = {"bf16": torch.float32, "fp64": torch.float64}[precision]
    assert weights(result.run.directory / "last")["head.weight"].dtype is dtype


def test_tuned_and_fixed_executions_train(recipe_file: Path) -> None:
    tuned = train(load_recipe(recipe_file, ["tune=true", "schedule.epochs=1"])).run
    assert {situation.training for situation in tuned.hne.tunings} == {True, False}
    assert treeify.load(tuned.directory / "last").tunings == tuned.hne.tunings
    looped = train(load_recipe(recipe_file, ["execution=[packed, looped, looped]"])).run
    assert looped.hne.execution == ("packed", "looped", "looped")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_same_but_for_rounding(recipe_file: Path) -> None:
    plain = train(load_recipe(recipe_file, [])).last
    result = train(load_recipe(recipe_file, ["compile=true"]))
    assert plain is not None and result.last is not None
    assert result.last.loss == pytest.approx(plain.loss, rel=1e-3)
    assert treeify.load(result.run.directory / "last").leaves == 4


def test_trackers_are_told(recipe_file: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(load_recipe(recipe_file, ["trackers=[tensorboard]"]))
    (events,) = result.run.directory.rglob("events.out.*")
    found = EventAccumulator(str(events.parent)).Reload()
    accuracy = found.Scalars("held_out/accuracy/4")
    assert [own.step for own in accuracy] == [STEPS, 2 * STEPS]
    assert result.last is not None
    assert accuracy[-1].value == pytest.approx(result.last.held_out[-1].accuracy)
    assert not [tag for tag in found.Tags()["scalars"] if "/leaves/" in tag]


def test_weights_and_biases_is_told(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    result = train(load_recipe(recipe_file, ["trackers=[wandb]"]))
    (log,) = tmp_path.rglob("run-*.wandb")
    told = log.read_bytes()
    assert result.last is not None
    for own in result.last.held_out:
        assert f"held_out/nll/{own.leaves}".encode() in told
        assert str(own.nll).encode() in told


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


def test_eval_gives_every_figure_as_table_json_and_csv(recipe_file: Path) -> None:
    train(load_recipe(recipe_file, ["schedule.epochs=1"]), out=Path("here"))
    shown = CliRunner().invoke(app, ["eval", "here", "--json", "--csv", "scores.csv"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    hne = treeify.load("here/last").eval()
    images = load_recipe(recipe_file).data.load()
    x = images.held_out[0][0][None]
    with torch.no_grad():
        parts = [(hne(x), y) for x, y, *_ in held_out_loader(images.held_out, 300)]
    logits, target = (torch.cat(part) for part in zip(*parts, strict=True))
    right = logits.argmax(2) == target[:, None]
    single = (100 * right.double().mean(0)).tolist()
    assert found["leaf_accuracy"] == pytest.approx(single)
    with Path("scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    first, alone = lines[:3], lines[3:]
    assert {line["kind"] for line in alone} == {"single"}
    for row, line, leaves in zip(found["scores"], first, (1, 2, 4), strict=True):
        mean = logits[:, :leaves].mean(1)
        expected = {
            "leaves": leaves,
            "accuracy": 100 * (mean.argmax(1) == target).double().mean().item(),
            "nll": F.cross_entropy(mean, target).item(),
            "logit_std": logits[:, :leaves].std(1, correction=0).mean().item(),
            "macs": hne.count_macs(leaves),
            "parameters": hne.count_parameters(leaves),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-4), key
        assert line == {"kind": "first", **{key: str(value) for key, value in row.items()}}
    for row in found["scores"]:  # loosely: other tests run beside this one
        own = Timer("hne.predict(x, leaves=n)", globals={"hne": hne, "x": x, "n": row["leaves"]})
        milliseconds = 1e3 * own.timeit(20).median
        assert milliseconds / 8 < row["milliseconds"] < 8 * milliseconds
    assert [float(line["accuracy"]) for line in alone] == pytest.approx(single)
    assert [line["leaves"] for line in alone] == ["0", "1", "2", "3"]
    larger = CliRunner().invoke(
        app, ["eval", "here", "--json", "--no-latency", "--data", "size=16"]
    )
    scored = json.loads(larger.output)["scores"]
    assert [own["macs"] for own in scored] == [
        own.macs for own in costs(hne, torch.zeros(1, 3, 16, 16))
    ]
    table = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["eval", "here"]).output
    for heading in ("ECE %", "logit std", " ms", "NLL", f"{found['scores'][2]['accuracy']:.2f}"):
        assert heading in table, heading
    assert ", ".join(f"{value:.2f}" for value in single) in table


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
    written = yaml.safe_load((train(short).run.directory / "recipe.yaml").read_text())
    assert written["loss"] == {
        "name": "hierarchical_distillation",
        "alpha": 0.5,
        "temperature": 2.0,
        "scale_by_t2": False,
        "ramps": {},
    }
    assert written["data"]["split_seed"] == 0
