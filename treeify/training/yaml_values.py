"""YAML as people write it: numbers as in YAML 1.2, and no more than anybody would write by hand."""

import re
from collections import deque
from collections.abc import Iterator
from typing import Any

import yaml

KeyPath = tuple[str, ...]

# A recipe has hundreds of values, and lists of class names tens of thousands. Aliases count as what
# they stand for: ten of ten of ten, nine times, are a page of text and fill any memory.
MOST_BYTES, MOST_VALUES, DEEPEST = 2**20, 30_000, 50
_WIDEST = 2**63


def parse(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML document, and its node, which knows the line of every key.

    Raises:
        ValueError: it is no YAML, or goes beyond a limit; the message says which, and where.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # dates that do not exist and odd tags make it raise anything
        raise ValueError(
            f"a value does not fit its tag: {type(error).__name__}: {error}"
        ) from error


def keys(root: yaml.Node | None) -> Iterator[tuple[KeyPath, int]]:
    """Path and line of every key below a node; aliases are followed once."""
    waiting: deque[tuple[yaml.Node | None, KeyPath]] = deque([(root, ())])
    seen: set[int] = set()
    while waiting:
        node, path = waiting.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend((item, (*path, str(index))) for index, item in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*path, str(key.value))
                yield inner, key.start_mark.line + 1
                waiting.append((value, inner))


def check_keys(node: yaml.Node | None) -> None:
    """Raise ValueError for a key that is there twice: YAML would take the last one."""
    lines: dict[KeyPath, int] = {}
    for path, line in keys(node):
        if path in lines:
            key = ".".join(path)
            raise ValueError(f"the key {key} is there twice, in lines {lines[path]} and {line}")
        lines[path] = line


_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """A loader that stops at the first value beyond a limit; it has then read no further."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        # Of every node that is complete: how many values it is, and how deep.
        self._extents: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, counted; called by the loader for every value, from the outside in."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self._depth += 1
        self._require(self._depth <= DEEPEST, f"nested deeper than {DEEPEST} levels", mark)
        self._require(len(self._extents) <= MOST_VALUES, f"more than {MOST_VALUES:,} values", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            self._require(node in self._extents, "an alias of what it is a part of", mark)
            return node
        inner = [self._extents[child] for child in _children(node)]
        count, depth = 1 + sum(count for count, _ in inner), 1 + max([0, *(d for _, d in inner)])
        self._require(count <= MOST_VALUES, f"more than {MOST_VALUES:,} values", mark)
        self._require(depth <= DEEPEST, f"nested deeper than {DEEPEST} levels", mark)
        self._extents[node] = count, depth
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a node: `1:2` is a split, and no number to the base 60 as in YAML 1.1."""
        if kind is yaml.ScalarNode and implicit[0] and _BASE_60.fullmatch(value):
            return "tag:yaml.org,2002:str"
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def construct_yaml_int(self, node: Any) -> int:
        """A number that fits 64 bits, as tensors and files hold them."""
        number: int = super().construct_yaml_int(node)
        self._require(abs(number) < _WIDEST, "a number of more than 64 bits", node.start_mark)
        return number

    def construct_yaml_str(self, node: Any) -> str:
        """Text that a file can hold: halves of characters, which escapes can say, are none."""
        text: str = super().construct_yaml_str(node)
        halves = any("\ud800" <= character <= "\udfff" for character in text)
        self._require(not halves, "half a character", node.start_mark)
        return text

    @staticmethod
    def _require(holds: bool, problem: str, mark: Any) -> None:
        if not holds:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
# `1e-4` is a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
