"""Dicts and dataclasses of the user's own."""

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_map

from treeify.tracing.structures import construction, mutable, register_structures


class Tagged(dict[str, Any]):
    pass


@dataclass
class Both(OrderedDict[str, Any]):
    a: Any = None

    def __post_init__(self) -> None:
        self["a"] = self.a


@dataclass
class Plain:
    a: Any


def test_values_in_any_structure_are_reached() -> None:
    value = [Tagged(x=Both(a=1)), (Plain({"y": 2}),)]
    register_structures(value)
    doubled = tree_map(lambda number: 2 * number, value)
    assert doubled == [Tagged(x=Both(a=2)), (Plain({"y": 4}),)]
    assert type(doubled[0]) is Tagged
    assert type(doubled[0]["x"]) is Both


def test_a_dict_is_constructed_as_it_was() -> None:
    for value in (OrderedDict(b=1, a=2), Tagged(x=3), Both(a=4), defaultdict(list, {"k": 5})):
        function, args, kwargs = construction(value)
        again = function(*args, **kwargs)
        assert type(again) is type(value)
        assert list(again.items()) == list(value.items())
    assert again["new"] == []


def test_what_fx_keeps_immutable_is_given_as_it_was() -> None:
    value = (immutable_list([immutable_dict(a=immutable_list([1]))]), torch.Size([1]))
    given = mutable(value[0])
    assert type(given) is list
    assert type(given[0]) is dict
    assert type(given[0]["a"]) is list
