"""The folder of a repository: all of its files, written at once or not at all."""

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from treeify import files
from treeify.conversion import saved_config
from treeify.deploy.directory import publish
from treeify.deploy.exporter import export
from treeify.errors import CheckpointError
from treeify.models.hub import local_path
from treeify.share import picture
from treeify.share.card import card
from treeify.share.contents import Contents, as_yaml, load_ensemble, read_contents
from treeify.share.subject import Subject, listed_extras
from treeify.share.timm_repository import write_leaf
from treeify.training.run_directory import RECIPE

EXTRAS = ("export", "report")
CARD = "README.md"
EXPORT, REPORT = "export", "report.html"


@dataclass(frozen=True)
class Choices:
    """What goes into a repository.

    Args:
        repository: `org/name`.
        extras: some of `EXTRAS`.
        as_timm: the leaf that is all there is, as timm writes it; None for the ensemble.
        data: keys of the data section to set for measuring, `key=value`.
        licence: of the weights, its identifier.
        base_model: the hub's name of the weights that it began with.
        trust: as in `treeify.load`.
    """

    repository: str
    extras: Collection[str] = ()
    as_timm: int | None = None
    data: Sequence[str] = ()
    licence: str | None = None
    base_model: str | None = None
    trust: bool = False

    @property
    def name(self) -> str:
        """The repository's, without its owner."""
        return self.repository.partition("/")[2]


def write_folder(
    directory: str | Path,
    final: Path,
    choices: Choices,
    observe: Callable[[str], None] = lambda what: None,
) -> list[Path]:
    """Write the folder of a repository.

    Args:
        directory: what is shared: a run, one of its checkpoints, or an ensemble.
        final: the folder, new or empty.
        choices: what goes into it.
        observe: hears what is being done.

    Returns:
        Its files, relative to it.

    Raises:
        CheckpointError: there is no ensemble, or the folder cannot be written.
        ExportError: it cannot be exported.
        InputError: the directory or what was chosen does not fit.
        LeafError: there is no such leaf.
    """
    files.check_new(final, CheckpointError)
    directory = local_path(directory)
    if (leaf := choices.as_timm) is None:
        observe("reading and measuring")
        contents = read_contents(directory, choices.name, choices.data, trust=choices.trust)

        def write(draft: Path) -> None:
            _write_ensemble(contents, draft, choices, observe)
    else:
        hne, _ = load_ensemble(directory, trust=choices.trust)

        def write(draft: Path) -> None:
            write_leaf(hne, leaf, draft, choices.repository, choices.licence, choices.base_model)

    try:
        publish(final, write, overwrite=False)
    except OSError as error:
        raise CheckpointError(
            f"{final} cannot be written: {error}", next_step="Nothing has changed there."
        ) from error
    return sorted(path.relative_to(final) for path in final.rglob("*") if path.is_file())


def _write_report(contents: Contents, file: Path, name: str) -> None:
    from treeify.report.api import Report
    from treeify.report.sections.section import Contents as Reported

    file.write_text(Report(Reported((contents.result,))).html(name), encoding="utf-8")


def _write_ensemble(
    contents: Contents, draft: Path, choices: Choices, observe: Callable[[str], None]
) -> None:
    for name, source in contents.files.items():
        shutil.copyfile(source, draft / name)
    saved_config.check_files(draft)  # a run that goes on may have replaced one in between
    if contents.recipe is not None:
        (draft / RECIPE).write_text(as_yaml(contents.recipe), encoding="utf-8")
    if "export" in choices.extras:
        observe("exporting")
        export(contents.hne, draft / EXPORT, name=choices.name)
    if "report" in choices.extras:
        observe("drawing the report")
        _write_report(contents, draft / REPORT, choices.name)
    observe("writing the card")
    drawn = picture.trade_off(contents.result, choices.name)
    if not isinstance(drawn, str):
        (draft / picture.FILE).write_bytes(drawn.content)
    subject = Subject(
        choices.repository,
        contents.result,
        contents.hne.architecture,
        contents.hne.example,
        contents.hne.preparation,
        choices.licence,
        choices.base_model or contents.base_model,
        contents.is_from_scratch,
        drawn,
        listed_extras([name for name in EXTRAS if name in choices.extras]),
    )
    (draft / CARD).write_text(card(subject), encoding="utf-8")
