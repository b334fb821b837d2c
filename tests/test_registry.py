"""Functions found by name: registered ones, and those in modules of the user's own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from treeify import registry
from treeify.errors import DataError, RecipeError
from treeify.registry import PathOrName, Registry, import_function

SOURCE = """
class Scaled:
    def __call__(self): ...

    @staticmethod
    def of_two(): ...

def scaled(): ...

WIDTH = 4
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module that works and one that does not."""
    (tmp_path / "users_module.py").write_text(SOURCE)
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("users_module", None)


def test_a_name_is_registered_once() -> None:
    registry = Registry("loss")

    @registry.register("mean")
    def mean() -> None: ...

    assert registry.find("mean") is mean
    with pytest.raises(RecipeError, match=r"two functions want to be the loss 'mean'(.|\n)*mean"):
        registry.register("mean")(lambda: None)
    with pytest.raises(RecipeError, match=r"no loss is called 'meen'(.|\n)*'mean' .did you mean"):
        registry.find("meen")


@pytest.mark.parametrize("name", ["scaled", "Scaled", "Scaled.of_two"])
@pytest.mark.usefixtures("here")
def test_functions_and_classes_of_the_current_directory_are_found(name: str) -> None:
    before = list(sys.path)
    function = Registry("loss").find(f"users_module:{name}")
    assert function.__qualname__ == name
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "module 'no_such_module' of data set 'no_such_module:f' cannot be"),
        ("broken_module:f", "Found ZeroDivisionError: division by zero\n  Run from the directory"),
        ("users_module:scalled", "has no function 'scalled'(.|\n)*Did you mean 'scaled'"),
        ("users_module:Scaled.of_tow", "has no function 'Scaled.of_tow'"),
        ("users_module:WIDTH", "has no function 'WIDTH'(.|\n)*Found int 4"),
        ("users_module:", "has no function ''"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_imported_is_explained(name: str, message: str) -> None:
    before = list(sys.path)
    with pytest.raises(DataError, match=message) as caught:
        import_function(name, "data set", DataError, "a function")
    assert "Expected a function" in str(caught.value)
    assert sys.path == before


@pytest.mark.usefixtures("here")
def test_what_may_be_a_path_is_absolute_where_there_is_one() -> None:
    adapter = TypeAdapter(PathOrName)
    assert adapter.validate_python("users_module.py") == str(Path("users_module.py").absolute())
    assert adapter.validate_python("resnet18") == "resnet18"


def test_the_current_directory_is_looked_at_for_named_functions_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(sys.path)
    monkeypatch.setattr(registry, "keep_directory", True)
    import_function("json:loads", "data set", DataError, "a function")
    assert sys.path == before
    import_function("users_module:scaled", "data set", DataError, "a function")
    assert sys.path == [*before, str(here)]  # what it imports later may lie there, too
    sys.path.remove(str(here))
