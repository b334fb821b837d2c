"""Tree arithmetic against walking every leaf's path."""

from functools import cache
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeify.errors import LeafError, SplitError
from treeify.tree import Span, Tree, fanouts_for

fanouts = st.lists(st.integers(2, 4), max_size=3).map(tuple)
trees = fanouts.map(Tree)


@st.composite
def trees_with_leaves(draw: st.DrawFn) -> tuple[Tree, Span]:
    tree = draw(trees)
    start = draw(st.integers(0, tree.leaves - 1))
    return tree, Span(start, draw(st.integers(start + 1, tree.leaves)))


@cache
def walked_paths(tree: Tree) -> list[list[tuple[int, ...]]]:
    """Every leaf, depth-first, as the branches on its way: each branch is the choices so far."""
    choices = product(*(range(fanout) for fanout in tree.fanouts))
    return [[choice[:level] for level in range(tree.levels)] for choice in choices]


@cache
def numbered(tree: Tree, level: int) -> dict[tuple[int, ...], int]:
    """Index of every branch of a level, in the order a depth-first walk meets them."""
    order: dict[tuple[int, ...], int] = {}
    for path in walked_paths(tree):
        order.setdefault(path[level], len(order))
    return order


@given(trees)
def test_branches_are_those_a_walk_meets(tree: Tree) -> None:
    assert tree.branches == tuple(len(numbered(tree, level)) for level in range(tree.levels))
    assert tree.leaves == len(walked_paths(tree))


@given(trees)
def test_path_is_the_walk_to_the_leaf(tree: Tree) -> None:
    for leaf, path in enumerate(walked_paths(tree)):
        expected = tuple(numbered(tree, level)[branch] for level, branch in enumerate(path))
        assert tree.path(leaf) == expected


@given(trees_with_leaves())
def test_span_is_exactly_what_the_leaves_need(example: tuple[Tree, Span]) -> None:
    tree, leaves = example
    for level in range(tree.levels):
        index = numbered(tree, level)
        needed = {index[path[level]] for path in walked_paths(tree)[leaves.start : leaves.stop]}
        span = tree.span(level, leaves)
        assert needed == set(range(span.start, span.stop))
        assert span.size == len(needed)


@given(trees_with_leaves())
def test_a_span_descends_from_the_span_above(example: tuple[Tree, Span]) -> None:
    tree, leaves = example
    for level, fanout in enumerate(tree.fanouts):
        assert tree.span(level + 1, leaves).parents(fanout) == tree.span(level, leaves)


@given(trees, st.data())
def test_more_leaves_only_add_branches(tree: Tree, data: st.DataObject) -> None:
    few = data.draw(st.integers(1, tree.leaves))
    more = data.draw(st.integers(few, tree.leaves))
    counts = zip(tree.branch_count(few), tree.branch_count(more), strict=True)
    assert all(before <= after for before, after in counts)


@given(trees)
def test_nested_sizes_are_the_leaves_below_the_first_branch_of_each_level(tree: Tree) -> None:
    below_first = [
        sum(set(path[level]) <= {0} for path in walked_paths(tree)) for level in range(tree.levels)
    ]
    assert tree.nested_sizes == tuple(reversed(below_first))


@given(trees)
def test_every_nested_size_is_a_tree(tree: Tree) -> None:
    for size in tree.nested_sizes:
        dropped, smaller = tree.first(size)
        assert smaller.leaves == size
        assert smaller.fanouts == tree.fanouts[dropped:]


@given(trees, st.data())
def test_first_leaves_are_a_tree_if_siblings_have_equally_many_children(
    tree: Tree, data: st.DataObject
) -> None:
    leaves = data.draw(st.integers(1, tree.leaves))
    walked = walked_paths(tree)[:leaves]
    kept = [sorted({path[level] for path in walked}) for level in range(tree.levels)]
    children = [
        {sum(child[:-1] == branch for child in below) for branch in above}
        for above, below in pairwise(kept)
    ]
    if any(len(counts) > 1 for counts in children):
        with pytest.raises(LeafError, match=f"first {leaves} leaves do not form a tree"):
            tree.first(leaves)
    else:
        dropped, smaller = tree.first(leaves)
        assert smaller.branches == tuple(len(branches) for branches in kept[dropped:])


@given(trees)
def test_leaves_outside_the_tree_are_refused(tree: Tree) -> None:
    for leaf in (-1, tree.leaves, 0.0, True):
        with pytest.raises(LeafError, match=f"from 0 to {tree.leaves - 1}"):
            tree.path(leaf)
    for leaves in (0, -1, tree.leaves + 1, 1.0, True):
        with pytest.raises(LeafError, match=f"from 1 to {tree.leaves}"):
            tree.check_size(leaves)


@pytest.mark.parametrize("fanout", [1, 0, -2, 2.0, "2", True])
def test_fanouts_below_two_are_refused(fanout: object) -> None:
    with pytest.raises(SplitError, match=f"Found fanout {fanout!r}"):
        Tree((2, fanout))


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_missing_fanouts_are_found(fanouts: list[int], data: st.DataObject) -> None:
    shared = data.draw(st.sampled_from(fanouts))
    given_fanouts = [None if fanout == shared else fanout for fanout in fanouts]
    leaves = Tree(tuple(fanouts)).leaves
    assert fanouts_for(leaves, given_fanouts) == tuple(fanouts)
    assert fanouts_for(leaves, fanouts) == tuple(fanouts)


@pytest.mark.parametrize(
    ("leaves", "fanouts"),
    [(6, [None, None]), (8, [2, 2]), (4, []), (12, [5, None]), (2, [2, None])],
)
def test_leaves_that_fit_no_tree_are_refused(leaves: int, fanouts: list[int | None]) -> None:
    with pytest.raises(SplitError, match=f"{leaves} models"):
        fanouts_for(leaves, fanouts)


def test_prints_as_a_tree() -> None:
    assert str(Tree((2, 3))).splitlines() == [
        "6 leaves, branches per level 1 2 6",
        "level 0",
        "├─ level 1 branch 0: leaves 0-2",
        "│  ├─ level 2 branch 0: leaf 0",
        "│  ├─ level 2 branch 1: leaf 1",
        "│  └─ level 2 branch 2: leaf 2",
        "└─ level 1 branch 1: leaves 3-5",
    ]


def test_a_tree_without_splits_is_the_base_model() -> None:
    tree = Tree()
    assert (tree.leaves, tree.levels, tree.branches, tree.nested_sizes) == (1, 1, (1,), (1,))
    assert tree.path(0) == (0,)


def test_trees_are_values() -> None:
    assert Tree([2, 2]) == Tree((2, 2))
    assert len({Tree((2, 2)), Tree((2, 2)), Tree((4,))}) == 2


@given(trees_with_leaves())
def test_pieces_go_on_where_a_branch_is_computed_already(example: tuple[Tree, Span]) -> None:
    tree, leaves = example
    pieces = tree.pieces(leaves)
    covered = [leaf for _, piece in pieces for leaf in range(*piece)]
    assert covered == list(range(*leaves))
    paths = walked_paths(tree)
    for level, piece in pieces:
        assert piece.size > 0
        for here in range(tree.levels):
            computed = {path[here] for path in paths[: piece.start]}
            needed = {path[here] for path in paths[piece.start : piece.stop]}
            if here < level:
                assert len(needed) == 1
                assert needed <= computed
            else:
                assert not needed & computed


@given(trees)
def test_no_leaves_are_no_pieces(tree: Tree) -> None:
    for leaf in range(tree.leaves + 1):
        assert tree.pieces(Span(leaf, leaf)) == []


@given(trees, st.data())
def test_any_increasing_sizes_compute_every_branch_once(tree: Tree, data: st.DataObject) -> None:
    sizes = sorted(data.draw(st.sets(st.integers(1, tree.leaves), min_size=1)))
    computed = [0] * tree.levels
    for start, stop in pairwise([0, *sizes]):
        for first, leaves in tree.pieces(Span(start, stop)):
            for level in range(first, tree.levels):
                computed[level] += tree.span(level, leaves).size
    assert tuple(computed) == tree.branch_count(sizes[-1])


@given(trees_with_leaves(), st.data())
def test_the_leaves_within_a_branch_are_those_below_it(
    example: tuple[Tree, Span], data: st.DataObject
) -> None:
    tree, leaves = example
    level = data.draw(st.integers(0, tree.levels - 1))
    branches = tree.span(level, leaves)
    parts = [leaves.within(branch, tree.leaves_below(level)) for branch in range(*branches)]
    assert [leaf for part in parts for leaf in range(*part)] == list(range(*leaves))
    for branch, part in zip(range(*branches), parts, strict=True):
        assert {tree.path(leaf)[level] for leaf in range(*part)} == {branch}
