"""What a card is about: everything that is known of an ensemble, and what is published with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from treeify.data.preparation import Preparation
from treeify.models.architecture import Architecture
from treeify.report.results import Result
from treeify.share.picture import Picture


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Args:
        repository: `org/name`.
        result: what is known of the ensemble.
        architecture: of its base model; None for a module that only its author can build.
        example: the shape of an image, `(C, H, W)`.
        preparation: of images; None if it is not known.
        licence: its identifier, as the user gave it; None if nobody said it.
        base_model: the hub's name of the weights that it began with; None if that is not known.
        is_from_scratch: whether it is known to have begun with random weights.
        picture: of accuracy against MACs, or why there is none.
        extras: what else is in the repository, by its path there.
    """

    repository: str
    result: Result
    architecture: Architecture | None
    example: tuple[int, ...]
    preparation: Preparation | None
    licence: str | None = None
    base_model: str | None = None
    is_from_scratch: bool = False
    picture: Picture | str = "No picture was made."
    extras: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The repository's, without its owner."""
        return self.repository.partition("/")[2]


def listed_extras(names: Sequence[str]) -> dict[str, str]:
    """What a card says of what else is in a repository, by its path."""
    said = {
        "export": ("export", "the same answers as ONNX files, without PyTorch"),
        "report": ("report.html", "figures of all that was measured, to be downloaded"),
    }
    return dict(said[name] for name in names)
