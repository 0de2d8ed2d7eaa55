"""Exported graphs: all of a model's, those of loops and branches included; what in them is constant, and where from.

An exported model is a GraphModule whose calls of `cond`, `while_loop`, `scan`, `map` and `invoke_subgraph` take others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from lowbit import LowbitError

META = ("val", "stack_trace", "nn_module_stack")
"""What a node of an exported graph says of itself; of constants, the first."""
WAS = "lowbit_was"
"""Of a new node, the name of the exported one that it stands for; None: of none."""
CODES = "lowbit_codes"
"""Of a node that gives codes of the value that it stands for, their scale and zero point."""
_COPIED = ("stack_trace", "nn_module_stack", "torch_fn", "from_node")


class GraphError(LowbitError):
    """A graph is none that was exported, or cannot be changed as asked."""


# Where the arguments of a call are that each of its graphs is given as they are, after what is computed anew.
_GIVEN = {"cond": 3, "while_loop": 3, "scan": 3, "map_impl": 2}
_ANEW = {"cond": (), "while_loop": (2,), "scan": (1, 2), "map_impl": (1,)}
# Of loops, where what they carry begins.
_CARRIES = {"while_loop": 2, "scan": 1}
_ROWS = {"scan": 2, "map_impl": 1}
# Of those that run one graph once, from where on its arguments are what it is given.
_FROM = {"invoke_subgraph": 2, "wrap_with_set_grad_enabled": 2, "wrap_with_autocast": 5}


@dataclass(eq=False)
class Call:
    """A node that runs other graphs, on arguments that are the same for all of them."""

    region: Region
    node: Node
    graphs: list[Region]

    @property
    def operands(self) -> list[Any]:
        """What each graph's placeholders stand for; None: what is computed anew each time."""
        name = _name(self.node)
        args: Any = self.node.args
        return list(args[_FROM[name] :]) if name in _FROM else [*(None,) * self.computed, *args[_GIVEN[name]]]

    @property
    def computed(self) -> int:
        """How many of the operands are computed anew; they are the first."""
        args: Any = self.node.args
        return sum(len(args[at]) for at in _ANEW.get(_name(self.node), ()))

    @property
    def begun(self) -> list[Any]:
        """What each graph's placeholders stand for, or begin with where it is carried; None: rows of something."""
        begins: Any = self.node.args[_CARRIES[_name(self.node)]] if self.carried else []
        return [*begins, *(None,) * (self.computed - len(begins)), *self.operands[self.computed :]]

    @property
    def rows(self) -> list[Any]:
        """What its graph is given row by row."""
        at: Any = _ROWS.get(_name(self.node))
        return [] if at is None else list(self.node.args[at])  # pyright: ignore[reportArgumentType] - a list

    @property
    def carried(self) -> bool:
        """Whether what its graph gives is what it is given in the next round."""
        return _name(self.node) in _CARRIES

    @property
    def returned(self) -> int:
        """How many of its results, from the first, are what its graph gives as it is."""
        if self.carried:
            return len(self.node.args[_CARRIES[_name(self.node)]])  # pyright: ignore[reportArgumentType] - a list
        return 0 if _name(self.node) == "map_impl" else len(self.graphs[0].outputs)

    @property
    def giving(self) -> list[Region]:
        """The graphs that give what it gives: not a loop's condition."""
        return self.graphs[1:] if _name(self.node) == "while_loop" else self.graphs

    def regive(self, instead: dict[Node, Node]) -> None:
        """Give other nodes in the place of some, but for rows."""
        name, args = _name(self.node), list(self.node.args)
        places = range(_FROM[name], len(args)) if name in _FROM else {_GIVEN[name], _CARRIES.get(name, _GIVEN[name])}
        for at in places:
            args[at] = map_arg(args[at], lambda node: instead.get(node, node))
        self.node.args = tuple(args)

    def give(self, operand: Node) -> None:
        """One operand more."""
        self._operate(lambda held: (*held, operand))

    def take(self, at: int) -> None:
        """One operand less, which is not computed anew."""
        at -= self.computed
        self._operate(lambda held: (*held[:at], *held[at + 1 :]))

    def _operate(self, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
        name, args = _name(self.node), list(self.node.args)
        if name in _FROM:
            args[_FROM[name] :] = change(tuple(args[_FROM[name] :]))
        else:
            held: Any = args[_GIVEN[name]]
            args[_GIVEN[name]] = change(tuple(held))
        self.node.args = tuple(args)
        self.region.module.recompile()


@dataclass(eq=False)
class Region:
    """One graph of a model, and the calls that run it."""

    name: str
    module: GraphModule
    callers: list[Call] = field(default_factory=list)
    # Calls that it makes.
    calls: list[Call] = field(default_factory=list)
    # Nodes that run graphs in a way that is not known here.
    unknown: list[Node] = field(default_factory=list)
    # Where tensors lie that some graph of the model changes while it runs.
    written: set[int] = field(default_factory=set)

    @property
    def nodes(self) -> list[Node]:
        """Its nodes, in the order in which they run."""
        return list(self.module.graph.nodes)

    @property
    def placeholders(self) -> list[Node]:
        """What it is given."""
        return [node for node in self.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[Any]:
        """What it gives."""
        found: Any = self.nodes[-1].args[0]
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def give(self, instead: dict[int, Node]) -> None:
        """Give other nodes in some places."""
        output = self.nodes[-1]
        found: Any = output.args[0]
        given = [instead.get(at, each) for at, each in enumerate(self.outputs)]
        output.args = (type(found)(given) if isinstance(found, (tuple, list)) else given[0],)

    def constant(self, node: object) -> Tensor | None:
        """The tensor that a node is every time it runs: an attribute, here or where this graph is called; or None.

        One that a graph changes is none.
        """
        if not isinstance(node, Node):
            return None
        if node.op == "get_attr":
            found = _attribute(self.module, str(node.target))
            return found if isinstance(found, Tensor) and _memory(found) not in self.written else None
        if node.op != "placeholder" or not self.callers:
            return None
        given = [region.constant(each) for region, each in self.given(node)]
        return given[0] if all(each is not None and each is given[0] for each in given) else None

    def changes(self, node: Node) -> bool:
        """Whether something in this graph writes to where a value lies."""
        there = origin(node)
        return any(origin(each) is there for other in self.nodes for each in changed_by(other))

    def given(self, placeholder: Node) -> list[tuple[Region, Any]]:
        """What calls give for it, each with the graph that the call is in; None: what is computed anew."""
        at = self.placeholders.index(placeholder)
        return [(call.region, call.operands[at]) for call in self.callers]

    def path(self, node: Node) -> str:
        """The name of an attribute of the whole model that a constant is."""
        if node.op == "get_attr":
            return str(node.target)
        region, outer = self.given(node)[0]
        return region.path(outer)


def regions(model: nn.Module) -> list[Region]:
    """Every graph of an exported model, the whole first, each once however often it is called.

    Raises:
        GraphError: `model` is none that was exported.
    """
    told = isinstance(model, GraphModule) and all(
        "val" in node.meta for node in model.graph.find_nodes(op="placeholder")
    )
    if not isinstance(model, GraphModule) or not told:
        raise GraphError(
            f"a {type(model).__name__} is no exported graph; needed is torch.export.export(model, inputs).module()"
        )
    found = [Region("", model)]
    for region in found:
        for node in region.nodes:
            modules = _graphs(region, node)
            call = Call(region, node, [])
            if modules:
                region.calls.append(call)
            for name, module in modules:
                inner = next((each for each in found if each.module is module), None)
                if inner is None:
                    inner = Region(f"{region.name}.{name}".lstrip("."), module, written=region.written)
                    found.append(inner)
                inner.callers.append(call)
                call.graphs.append(inner)
    found[0].written.update(
        _memory(held)
        for region in found
        for node in region.nodes
        for each in changed_by(node)
        for held in _held_by(region, each)
    )
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def changed_by(node: Node) -> list[Node]:
    """What a node changes in place."""
    return [
        value
        for argument, given in _given(node)
        if argument.alias_info and argument.alias_info.is_write
        for value in given
    ]


def origin(node: Node) -> Node:
    """What a value is a view, a part or a list of: the node that made the memory in which it lies."""
    while node.op == "call_function":
        if node.target is operator.getitem:
            viewed = [node.args[0]]
        else:
            viewed = [value for argument, given in _given(node) if argument.alias_info for value in given]
        if not viewed or not isinstance(viewed[0], Node):
            return node
        node = viewed[0]
    return node


def _given(node: Node) -> list[tuple[Any, list[Node]]]:
    """Arguments of an operator, as its schema has them, with the nodes that are given for each, lists' too."""
    if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 # pyright: ignore - no public name
        return []
    arguments = node.target._schema.arguments  # noqa: SLF001 # pyright: ignore - as above
    pairs = [*zip(arguments, node.args, strict=False)]
    pairs += [(argument, node.kwargs[argument.name]) for argument in arguments if argument.name in node.kwargs]
    return [(argument, [each for each in tree_leaves(value) if isinstance(each, Node)]) for argument, value in pairs]


def _held_by(region: Region, node: Node) -> list[Tensor]:
    """The attributes that a node is, or is a view of; of what a graph is given, those of all calls."""
    node = origin(node)
    if node.op == "get_attr":
        held = _attribute(region.module, str(node.target))
        return [held] if isinstance(held, Tensor) else []
    if node.op != "placeholder" or not region.callers:
        return []
    given = [(outer, each) for outer, each in region.given(node) if isinstance(each, Node)]
    return [held for outer, each in given for held in _held_by(outer, each)]


def _graphs(region: Region, node: Node) -> list[tuple[str, GraphModule]]:
    """Graphs that a node runs, with the attributes' names."""
    if node.op != "call_function" or _name(node) is None:
        return []
    names = [str(each.target) for each in node.args if isinstance(each, Node) and each.op == "get_attr"]
    parts = [(name, _attribute(region.module, name)) for name in names]
    graphs = [(name, part) for name, part in parts if isinstance(part, GraphModule)]
    if graphs and _name(node) not in {*_GIVEN, *_FROM}:
        # What it does with them is not known: they stay as they are.
        region.unknown.append(node)
        return []
    return graphs


def _name(node: Node) -> Any:
    """The name of the higher-order operator that a node calls, or None."""
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else None  # noqa: SLF001 # pyright: ignore - no public name


def _attribute(module: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(module)


def source(node: Node) -> str:
    """Where in a user's program a node comes from, as the end of a sentence; nothing where that is not known."""
    return f", {found}" if (found := place(node)) else ""


def place(node: Node) -> str:
    """Where in a user's program a node comes from; nothing where that is not known.

    That is the last line outside torch; of what runs in a loop or a branch, where the loop begins.
    """
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    others = ('File "<', f'File "{Path(torch.__file__).parent}')
    places = [i for i, line in enumerate(lines) if line.startswith("File ") and not line.startswith(others)]
    if not places:
        return ""
    code = lines[places[-1] + 1 :][:1]
    return f"from {lines[places[-1]]}" + (f": {code[0]}" if code else "")


def lacks(node: Node) -> list[str]:
    """What a node should say of itself and does not."""
    if node.op in {"placeholder", "output", "call_module"}:
        return []
    if node.op == "get_attr":
        return [] if "val" in node.meta or "nn_module_stack" in node.meta else ["val"]
    return [name for name in META if node.meta.get(name) is None]


def untold(node: Node) -> str | None:
    """Why nothing can be put in the place of a node: new ones say what it says."""
    missing = lacks(node)
    return f"it does not say its {', '.join(missing)}; export the model anew" if missing else None


class Editor:
    """New nodes before a node of a region, which say all of themselves that exported ones do.

    They stand for what `like` did, unless that stays, and say that they come from where it came.
    """

    def __init__(self, region: Region, before: Node, like: Node, *, stays: bool = False) -> None:
        self.region, self.before, self.like, self.stays = region, before, like, stays

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of an operator."""
        graph = self.region.module.graph
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args, kwargs)
        node.meta["val"] = self.value(target, *map_arg(args, _value), **map_arg(kwargs, _value))
        node.meta |= {name: self.like.meta[name] for name in _COPIED if name in self.like.meta}
        node.meta[WAS] = None if self.stays else self.like.meta.get(WAS, self.like.name)
        return node

    def value(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What an operator gives of what nodes say of their values."""
        with _mode(self.like):
            return target(*args, **kwargs)

    def constant(self, name: str, value: Tensor) -> Node:
        """A tensor as an attribute of the model, of a name that is free: `name`, or one with a number."""
        return _constant(self.region, name, value, self.before, self.like)


def _constant(region: Region, name: str, value: Tensor, before: Node, like: Node) -> Node:
    """A node that is a tensor: an attribute of the whole model, which inner graphs are given by all that call them."""
    module, graph = region.module, region.module.graph
    fake = _mode(like).from_tensor(value, static_shapes=True)
    if not region.callers:
        with graph.inserting_before(before):
            node = graph.get_attr(_held(module, name, value))
        node.meta["val"] = fake
        return node
    for node in region.placeholders:
        if region.constant(node) is value:
            return node
    calls, graphs = _together(region)
    for call in calls:
        call.give(_constant(call.region, name, value, call.node, like))
    for each in graphs:
        last = each.placeholders[-1:]
        with each.module.graph.inserting_after(*last) if last else each.module.graph.inserting_before(each.nodes[0]):
            node = each.module.graph.placeholder(name)
        # Nodes' names are free ones; targets are names of arguments, too.
        node.target, node.meta["val"] = node.name, fake
        each.module.recompile()
    return region.placeholders[-1]


def _held(module: GraphModule, name: str, value: Tensor) -> str:
    """The name that a tensor has in a module, or the one that it is given."""
    for each, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor is value:
            return each
    names = (f"{name}{f'_{i}' if i else ''}" for i in range(len(module.graph.nodes) + 1))
    free = next(each for each in names if not hasattr(module, each))
    if isinstance(value, nn.Parameter):
        module.register_parameter(free, value)
    else:
        module.register_buffer(free, value)
    return free


def _together(region: Region) -> tuple[list[Call], list[Region]]:
    """All calls that run a graph, and all graphs that these run, and so on: they take the same operands."""
    calls: list[Call] = []
    graphs = [region]
    for each in graphs:
        for call in each.callers:
            if call not in calls:
                calls.append(call)
                graphs += [inner for inner in call.graphs if inner not in graphs]
    return calls, graphs


def _value(node: Node) -> Any:
    return node.meta["val"]


def _mode(node: Node) -> Any:
    values = node.meta.get("val")
    first = values[0] if isinstance(values, (tuple, list)) else values
    if not isinstance(first, FakeTensor):
        raise GraphError(f"{node.name} says nothing of its value{source(node)}; export the model anew")
    return first.fake_mode


def tidy(model: nn.Module) -> None:
    """Leave out what nothing uses: nodes, attributes of the model, what graphs are given; compile what is left.

    Calls that change something stay.
    """
    for region in reversed(regions(model)):
        graph = region.module.graph
        before = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        graph.eliminate_dead_code()
        after = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        for name in before - after:
            parent, _, leaf = name.rpartition(".")
            owner = region.module.get_submodule(parent)
            if isinstance(getattr(owner, leaf, None), Tensor):
                delattr(owner, leaf)
        if region.callers:
            _take_unused(region)
        graph.lint()
        region.module.recompile()


def _take_unused(region: Region) -> None:
    """Leave out operands that no graph uses which is given them."""
    calls, graphs = _together(region)
    for at in reversed(range(calls[0].computed, len(region.placeholders))):
        nodes = [each.placeholders[at] for each in graphs]
        if not any(node.users for node in nodes):
            for each, node in zip(graphs, nodes, strict=True):
                each.module.graph.erase_node(node)
                each.module.recompile()
            for call in calls:
                call.take(at)
