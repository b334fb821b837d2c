"""Which part of a graph lies behind a split, and so the level of every node.

A split at a module means: from that module's nodes on, every branch becomes `fanout` branches. What
does not depend on the module stays shared, so a node's level is the number of splits among its
ancestors (itself included).
"""

from collections.abc import Iterator, Sequence

from torch import fx

from treeify.tracing.facts import facts

INPUT = "input"


class Dependencies:
    """Which nodes depend on which: one bit mask per node over the graph's order.

    Masks make the sets of thousands of nodes, one for each of hundreds of possible splits, cheap.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Compute the masks from the last node to the first, so that users come before inputs."""
        self.nodes = list(graph.nodes)
        position = {node: index for index, node in enumerate(self.nodes)}
        self.users = [sum(1 << position[user] for user in node.users) for node in self.nodes]
        # Per node, itself and all that is computed from it.
        self._below = [0] * len(self.nodes)
        # All that is computed from the images; the rest (parameters, constants) is nobody's child.
        self.rooted = 0
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            self._below[index] = 1 << index
            for user in node.users:
                self._below[index] |= self._below[position[user]]
            if node.op == "placeholder":
                self.rooted |= self._below[index]
        self._behind: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            if self.rooted >> index & 1:
                for name in _names_of(node):
                    self._behind[name] = self._behind.get(name, 0) | self._below[index]

    def behind(self, name: str) -> int:
        """Mask of every node that a split at `name` puts behind it; 0 if there is no such node."""
        return self._behind.get(name, 0)

    def names(self) -> list[str]:
        """Module and function paths in graph order, outer modules before inner ones."""
        names: dict[str, None] = {}
        for node in self.nodes:
            if node.op not in ("placeholder", "output", "get_attr"):
                names |= dict.fromkeys([*enclosing(facts(node).scope), facts(node).path])
        return list(names)


def _names_of(node: fx.Node) -> set[str]:
    """Every name of a split point that a node is part of."""
    if node.op == "output":
        return set()
    names = {facts(node).path, *enclosing(facts(node).scope)}
    return names if node.op == "placeholder" else names | {INPUT}


def enclosing(scope: str) -> Iterator[str]:
    """A module's path and those of the modules around it, the outermost first."""
    parts = scope.split(".") if scope else []
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def levels(graph: fx.Graph, names: Sequence[str]) -> dict[fx.Node, int]:
    """Every node's level: the number of splits among its ancestors, itself included."""
    return levels_within(Dependencies(graph), names)


def levels_within(dependencies: Dependencies, names: Sequence[str]) -> dict[fx.Node, int]:
    """The same for a graph whose dependencies are known.

    A node without ancestors (a parameter, a constant) takes the lowest level that reads it; one
    that nothing reads (`self.scale.data.clamp_(0, 1)`) that of the lowest reader of the same state.
    """
    masks = [dependencies.behind(name) for name in names]
    nodes = dependencies.nodes
    level = {node: sum(mask >> index & 1 for mask in masks) for index, node in enumerate(nodes)}
    free = [node for index, node in enumerate(nodes) if not dependencies.rooted >> index & 1]
    # Statements that only change state are read by nothing, and must not draw what they change to
    # the first level: they are placed last.
    unread = _unread(free)
    for node in reversed(free):
        if node not in unread:
            readers = [level[user] for user in node.users if user not in unread]
            level[node] = min(readers, default=0)
    lowest: dict[str, int] = {}  # the lowest reader of a parameter, buffer or constant
    for node in free:
        if node.op == "get_attr" and node not in unread:
            target = str(node.target)
            lowest[target] = min(level[node], lowest.get(target, level[node]))
    for node in reversed(free):
        if node in unread:
            above = [level[user] for user in node.users]
            above += [lowest[target] for target in _state(node) if target in lowest]
            level[node] = min(above, default=0)
    return level


def _unread(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Of nodes in a graph's order, those that no value is computed from."""
    unread: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op != "output" and all(user in unread for user in node.users):
            unread.add(node)
    return unread


def _state(node: fx.Node) -> set[str]:
    """Parameters, buffers and constants that a node without other ancestors is computed from."""
    ancestors, stack = {node}, [node]
    while stack:
        inputs = [source for source in stack.pop().all_input_nodes if source not in ancestors]
        ancestors.update(inputs)
        stack += inputs
    return {str(source.target) for source in ancestors if source.op == "get_attr"}
