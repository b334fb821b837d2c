"""The trade-off: what is drawn stands in the table, and nothing that was not measured is drawn."""

from pytest import approx

from treeify.report.figures.trade_off import trade_off
from treeify.report.series import BaseModel, BudgetPoint, Curve, Spread

MACS = (100.0, 150.0, 250.0)


def curve(name: str, *accuracies: list[float]) -> Curve:
    return Curve(name, (1, 2, 4), MACS, tuple(Spread.of(values) for values in accuracies))


def test_every_size_stands_in_the_table_and_in_the_figure() -> None:
    chart = trade_off([curve("a", [60.0], [61.5], [63.0])])
    assert chart.table.cells == [
        ["a", "1", "100", "60.00"],
        ["a", "2", "150", "61.50"],
        ["a", "4", "250", "63.00"],
    ]
    (line,) = chart.figure.axes[0].lines
    assert line.get_xydata().tolist() == [[100, 60], [150, 61.5], [250, 63]]


def test_seeds_give_a_band_from_the_least_to_the_most() -> None:
    chart = trade_off([curve("a", [60.0, 62.0], [61.0, 65.0], [70.0, 70.0])])
    assert chart.table.cells[0] == ["a", "1", "100", "61.00", "60.00", "62.00"]
    assert "bands reach from the least to the most" in chart.description
    (band,) = chart.figure.axes[0].collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == approx((60, 70))


def test_networks_cost_a_base_model_each_and_have_no_accuracy() -> None:
    base = BaseModel("base model", 90.0)
    chart = trade_off([curve("a", [60.0], [61.5], [63.0])], base=base)
    rows = {row[0]: row for row in chart.table.cells}
    assert rows["base model"][2:] == ["90", "-"]
    assert rows["4 independent networks"][2:] == ["360", "-"]
    assert "accuracy not known" in chart.figure.legends[0].get_texts()[1].get_text()


def test_published_points_say_where_they_are_from_and_how_exact_they_are() -> None:
    class Read:
        name, source, kind = "Other", "Somebody, 2019, figure 5", "digitised"
        points = ((1e6, 70.0), (2e6, 72.0))

    budgets = [BudgetPoint("a", 120.0, 62.0)]
    chart = trade_off([curve("a", [1.0], [2.0], [3.0])], published=[Read()], budgets=budgets)
    assert chart.table.cells[-1] == [
        "Other",
        "-",
        "2,000,000",
        "72.00",
        "digitised: Somebody, 2019, figure 5",
    ]
    assert "read off a plot in Somebody, 2019, figure 5" in chart.description
    assert "Crosses" in chart.description
