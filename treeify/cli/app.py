"""The `treeify` command: its subcommands, and what a user sees when one fails."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from treeify.engine.allocator import tune_allocator
from treeify.errors import TreeifyError, printable

BAD_INPUT, BUG, INTERRUPTED = 2, 1, 130
# What typer says about arguments in its own words; it exports one kind of such an error only.
_UsageError: Any = typer.BadParameter.__base__

# The function of each command, in the module of the command's name, and its line in the overview.
# Modules are imported when their command runs: `treeify --help` need not wait for torch.
COMMANDS = {
    "splits": ("splits", "List the points where a model can be split."),
    "plan": (
        "plan",
        "Choose where to split a model, and into how many branches, by what that costs.",
    ),
    "convert": ("convert", "Convert a classifier into a hierarchical neural ensemble."),
    "pack": ("pack", "Pack trained networks of one architecture into an ensemble."),
    "train": (
        "train",
        "Train a hierarchical neural ensemble from a recipe, or on a folder of images.",
    ),
    "recipes": ("recipes", "List the recipes that come with treeify, show one, or copy it."),
    "eval": ("evaluate", "Measure a trained ensemble on held-out images, for every nested size."),
    "ablate": ("run_grid", "Train a grid of recipes with several seeds, and compare them."),
    "predict": ("predict", "Classify images, with answers that get better while there is time."),
    "calibrate": (
        "calibrate",
        "Measure how fast an ensemble answers here, and choose when images need no more leaves.",
    ),
    "export": (
        "export",
        "Write an ensemble as files that answer without PyTorch, the first answer first.",
    ),
    "benchmark": (
        "benchmark",
        "Measure how fast ensembles and exports answer here, side by side.",
    ),
    "report": (
        "report",
        "Show what runs, ensembles, exports and grids reached: one page of figures and numbers.",
    ),
    "push": (
        "push",
        "Publish an ensemble on the Hugging Face hub, with a card of what was measured.",
    ),
    "verify": (
        "verify",
        "Convert models and prove that every leaf equals the untouched architecture.",
    ),
    "list": ("list_models", "List the models that convert, with their size and packed fraction."),
}


class _Commands(TyperGroup):
    """Subcommands by name; the overview knows their first lines only."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS:
            return super().resolve_command(ctx, args)
        return args[0], load_command(args[0]), args[1:]

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        errors = nullcontext() if ctx.params["debug"] else _readable_errors()
        with _printable_usage(), errors:
            return super().invoke(ctx)


class _Command(TyperCommand):
    """A command that tunes the allocator before it runs; asking for its help does not run it."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.find_root().params["keep_memory"]:
            tune_allocator()
        return super().invoke(ctx)


def load_command(name: str) -> Any:
    """The click command behind a name."""
    module = importlib.import_module(f"treeify.cli.{name}")
    alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    alone.command(name, cls=_Command)(getattr(module, COMMANDS[name][0]))
    return typer.main.get_command(alone)


@contextmanager
def _printable_usage() -> Iterator[None]:
    """Let typer's own messages, which quote arguments, hold nothing that a terminal obeys."""
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn exceptions into a message and an exit code."""
    try:
        yield
    except TreeifyError as error:
        raise _stop(type(error).__name__, str(error), BAD_INPUT) from error
    except KeyboardInterrupt as error:
        raise _stop("Interrupted", "stopped by Ctrl-C.", INTERRUPTED) from error
    except (typer.Exit, typer.Abort, _UsageError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            # A path that no message of ours foresaw: of a name too long, or not to be looked at.
            raise _stop(type(error).__name__, str(error), BAD_INPUT) from error
        text = f"{str(error) or 'no message'}\n  This is a bug; run again with --debug to see"
        raise _stop(type(error).__name__, f"{text} where: treeify --debug ...", BUG) from error


def _stop(kind: str, message: str, code: int) -> typer.Exit:
    # Text, not markup: a message may quote [brackets].
    text = Text.assemble((f"{kind}: ", "bold red"), printable(message))
    Console(stderr=True).print(text, soft_wrap=True, highlight=False)
    return typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"treeify {version('treeify')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
    keep_memory: Annotated[
        bool,
        typer.Option(
            "--tune-allocator/--no-tune-allocator",
            envvar="TREEIFY_TUNE_ALLOCATOR",
            help="Keep the memory of freed tensors for the next ones: faster on Linux, but the"
            " process holds its peak until it ends.",
        ),
    ] = True,
) -> None:
    """Turn an image classifier into a tree of networks that answers at any time.

    From a name to a trained ensemble:

        treeify splits resnet18

        treeify plan resnet18 --max-macs 6G

        treeify convert resnet18 --splits 4 --out my_ensemble

        treeify train digits_hne

        treeify train --data photos --model resnet18

        treeify eval runs/digits_hne

    And to answers by a deadline:

        treeify calibrate runs/digits_hne

        treeify predict runs/digits_hne digit.png --deadline 20ms

    And to files that answer without PyTorch:

        treeify export runs/digits_hne

        treeify benchmark runs/digits_hne exported/digits_hne
    """
    # `package.module:function` may name a module beside the user, as it would under `python -m`.
    registry: Any = importlib.import_module("treeify.registry")
    registry.keep_directory = True
    context.call_on_close(partial(setattr, registry, "keep_directory", False))


def main() -> None:
    """Run the command line; what the `treeify` script calls."""
    as_python_does = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(as_python_does(*args, **kwargs))
    app()
