"""The picture of a card: accuracy of every nested size against its MACs."""

from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO

from treeify.report.results import Result

FILE = "trade_off.png"


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows in words."""

    content: bytes
    title: str
    description: str


def trade_off(result: Result, name: str) -> Picture | str:
    """The picture of what was measured, or why there is none.

    Args:
        result: what is known of an ensemble.
        name: of it in the picture.
    """
    if len(result.scores) < 2:
        return "There is no picture of accuracy against MACs: accuracy is not known."
    if find_spec("matplotlib") is None:
        return (
            "There is no picture of accuracy against MACs: matplotlib was not installed (pip"
            " install 'treeify[report]')."
        )
    from treeify.report import style
    from treeify.report.figures.trade_off import trade_off as draw
    from treeify.report.series import BaseModel, Curve, Spread

    macs = {cost.leaves: cost.macs for cost in result.sizes}
    curve = Curve(
        name,
        tuple(score.leaves for score in result.scores),
        tuple(macs[score.leaves] for score in result.scores),
        tuple(Spread.of([score.accuracy]) for score in result.scores),
    )
    base = None if result.base is None else BaseModel("base model", result.base.macs)
    chart = draw([curve], base=base)
    content = BytesIO()
    with style.styled():
        chart.figure.savefig(content, format="png", facecolor=style.PAPER)
    return Picture(content.getvalue(), chart.title, chart.description)
