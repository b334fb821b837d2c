import re
from pathlib import Path

import pytest

from treeify import losses
from treeify.errors import DataError, RecipeError
from treeify.training.recipe_file import data_recipe, dump_recipe, load_recipe

GOOD = """\
name: small
model:
  name: treeify.models:cifar_resnet50
  kwargs: {width: 0.25}
  splits: [block1, block2:3]
data:
  name: digits
  size: 16
loss:
  name: co_distillation
  alpha: 0.3
optimizer:
  lr: 1e-4
schedule:
  epochs: 3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.loss.options == {"alpha": 0.3, "temperature": 2.0, "scale_by_t2": False}
    assert recipe.data.options["size"] == 16
    assert recipe.data.options["held_out"] == 360
    assert (recipe.optimizer.momentum, recipe.seed, recipe.out) == (0.9, 0, None)


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["out=some/where", "optimizer.weight_decay=1e-5"])
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4", "10e-5"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, number: str) -> None:
    recipe = load_recipe(write(tmp_path, GOOD.replace("1e-4", number)))
    assert recipe.optimizer.lr == pytest.approx(1e-4)


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    overrides = [
        "optimizer.lr=3e-2",
        "model.kwargs.layers=[1, 1, 1, 1]",
        "model.splits=2",
        "seed=7",
        "threads=null",
        "name=other",
    ]
    recipe = load_recipe(write(tmp_path, GOOD), overrides)
    assert recipe.optimizer.lr == 0.03
    assert recipe.model.kwargs == {"width": 0.25, "layers": [1, 1, 1, 1]}
    assert (recipe.model.splits, recipe.seed, recipe.name) == (2, 7, "other")


def test_another_loss_leaves_the_old_ones_options_behind(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_recipe(path, ["loss.name=independent"]).loss.options == {}
    both = load_recipe(path, ["loss.temperature=3.0", "loss.name=hierarchical_distillation"])
    assert both.loss.options == {"alpha": 0.5, "temperature": 3.0, "scale_by_t2": False}
    same = load_recipe(path, ["loss.name=co_distillation"])
    assert same.loss.options["alpha"] == 0.3


def test_a_registered_loss_brings_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(logits, target, tree, *, sharpness: int):
        return logits.sum()

    monkeypatch.setitem(losses.LOSSES, "mine", mine)
    recipe = load_recipe(write(tmp_path, GOOD), ["loss.name=mine", "loss.sharpness=2"])
    assert recipe.loss.options == {"sharpness": 2}
    assert "loss.sharpness (line 9): required key is missing" in problems(
        tmp_path, GOOD, "loss.name=mine"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 1e-4", "lrr: 1e-4", "optimizer.lrr (line 13): unknown key, did you mean 'lr'?"),
        ("size: 16", "sise: 16", "data.sise (line 8): unknown key, did you mean 'size'?"),
        ("alpha:", "alhpa:", "loss.alhpa (line 11): unknown key, did you mean 'alpha'?"),
        ("schedule:\n", "lr: 1\nschedule:\n", "lr (line 14): unknown key, did you mean 'optimizer"),
        (
            "epochs: 3",
            "epochs: 3\n  zzz: 1",
            "schedule.zzz (line 16): unknown key; valid here: name, epo",
        ),
        (
            "epochs: 3",
            "epochs: three",
            "schedule.epochs (line 15): should be a valid integer; found",
        ),
        ("epochs: 3", "epochs: '3'", "schedule.epochs (line 15): should be a valid integer; found"),
        ("epochs: 3", "epochs: 3.0", "schedule.epochs (line 15): should be a valid integer; found"),
        (
            "epochs: 3",
            "epochs: true",
            "schedule.epochs (line 15): should be a valid integer; found",
        ),
        ("epochs: 3", "epochs: 0", "schedule.epochs (line 15): should be greater than 0; found 0"),
        ("  epochs: 3", "  warmup_epochs: 1", "schedule.epochs (line 14): required key is missing"),
        ("epochs: 3", "epochs: 3\n  warmup_epochs: 3", "fewer warmup_epochs than epochs"),
        (
            "size: 16",
            "size: 0",
            "data.size (line 8): should be greater than 0 or be a valid list; found 0",
        ),
        ("alpha: 0.3", "alpha: 2", "loss.alpha (line 11): should be less than or equal to 1"),
        ("lr: 1e-4", "lr: .inf", "optimizer.lr (line 13): should be a finite number; found inf"),
        ("co_distillation", "co_destillation", "should name a loss, e.g. 'co_distillation'"),
        ("name: digits", "name: digitz", "should name a data set, e.g. 'digits'"),
        ("[block1, block2:3]", "1.5", "model.splits (line 5): should be a valid integer or be a v"),
        ("kwargs: {width: 0.25}", "fanout: 1", "model.fanout (line 4): should be greater than or"),
        ("name: small", "name: ../small", "name (line 1): should match pattern"),
        ("name: small", "name: small\ndevice: gpu", "device (line 2): should match pattern"),
        (
            "epochs: 3",
            "epochs: 3\n  epochs: 4",
            "schedule.epochs (line 16): the key is there twice, f",
        ),
        ("epochs: 3", "epochs: [3", "is not valid YAML"),
        ("name: small", "1: small", "1"),
        (GOOD, "", "holds no keys"),
        (GOOD, "- a\n- b", "holds no keys"),
    ],
)
def test_mistakes_are_named_with_their_place(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    assert message in problems(tmp_path, GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr (command line): unknown key, did you mean 'lr'?"),
        ("optimzer.lr=1", "optimzer (command line): unknown key, did you mean 'optimizer'?"),
        ("seed=one", "seed (command line): should be a valid integer; found 'one'"),
        ("seed=9223372036854775808", "a number of more than 64 bits"),
        ("data.split_seed=4294967296", "data.split_seed (command line): should be less than"),
        ("seed", "'seed' is not of the form key.path=value"),
        ("=3", "'=3' is not of the form key.path=value"),
        ("seed.a=3", "should be a valid integer"),
        ("name.a=3", "name.a cannot be set: name is 'small'"),
        ("seed=[", "the value of 'seed=[' is not valid YAML"),
    ],
)
def test_mistaken_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    assert message in problems(tmp_path, GOOD, override)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("lr:", "lrr:").replace("size: 16", "size: big").replace("alpha", "beta")
    message = problems(tmp_path, text, "seed=-1", "nonsense")
    assert "has 5 problems" in message
    for key in ("optimizer.lrr", "data.size", "loss.beta", "seed", "nonsense"):
        assert key in message


def test_nothing_is_built_for_a_bad_recipe(tmp_path: Path) -> None:
    """The model named here cannot be built and the data is not there: neither is looked at."""
    text = GOOD.replace("treeify.models:cifar_resnet50", "no.such:model").replace(
        "name: digits\n  size: 16", f"name: image_folder\n  root: {tmp_path / 'nowhere'}"
    )
    assert load_recipe(write(tmp_path, text)).model.name == "no.such:model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
    with pytest.raises(DataError):
        load_recipe(write(tmp_path, text)).data.load()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("nowhere.yaml")):
        load_recipe(tmp_path / "nowhere.yaml")


def test_python_tags_are_refused(tmp_path: Path) -> None:
    text = GOOD.replace("name: small", "name: !!python/object/apply:os.getcwd []")
    assert "not valid YAML" in problems(tmp_path, text)


def test_an_endless_alias_is_an_error(tmp_path: Path) -> None:
    text = GOOD.replace("kwargs: {width: 0.25}", "kwargs: &a {width: *a}")
    found = problems(tmp_path, text)
    assert "an alias of what it is a part of" in found
    assert "line 4" in found


def test_a_data_section_from_words() -> None:
    section = data_recipe(["name=digits", "size=12"])
    assert (section.name, section.options["size"]) == ("digits", 12)
    with pytest.raises(RecipeError, match=r"rot .command line.: unknown key, did you mean 'root'"):
        data_recipe(["name=image_folder", "rot=photos"])
