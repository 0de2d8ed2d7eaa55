"""An exported program with a backend's kernels in the place of neutral operators, for where lowbit is not installed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from lowbit.activation import Activation
from lowbit.backends import Call, Description, Kernel, select
from lowbit.decompose import argument_names
from lowbit.errors import BackendError, NoKernelError
from lowbit.format import Format
from lowbit.numerics import Scales
from lowbit.ops import SCALES, call_of, typed
from lowbit.table import align
from lowbit.tensor import INNER, QuantizedTensor

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True, slots=True)
class Lowering:
    """What became of one neutral operator."""

    # The weight's name, or the node's where no weight of the program's own is used.
    name: str
    op: str
    format: str
    activation: str | None
    # None: the operator stays, and decomposes to aten where the program is compiled.
    kernel: str | None
    packed: bool
    # What runs in its place besides aten operators.
    operators: tuple[str, ...]
    # Why each other kernel was not chosen, or why there is none.
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """The new program, and a row for each neutral operator of the old one."""

    program: ExportedProgram
    rows: tuple[Lowering, ...]

    def to_json(self) -> str:
        """The rows as JSON."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    def __str__(self) -> str:
        """The rows as aligned text, and below why operators stay."""
        lines = align(
            [
                {
                    "weight": row.name,
                    "op": row.op,
                    "format": row.format,
                    "kernel": "none" if row.kernel is None else row.kernel + (" (packed)" if row.packed else ""),
                    "runs": ", ".join(row.operators) or "aten",
                }
                for row in self.rows
            ]
        )
        stay = [row for row in self.rows if row.kernel is None]
        return "\n".join(lines + [f"{row.name} stays {row.op}: {reason}" for row in stay for reason in row.refusals])


def lower(exported: ExportedProgram, backend: str) -> Lowered:
    """Replace neutral operators by what the kernels of `backend` run, on weights packed for them.

    The new program holds plain tensors and operators of the backend there, which a process loads from the backend's
    library without lowbit; a kernel that only calls aten needs not even that. Operators that the backend does not take
    stay: compiling the program decomposes them to aten. The program given is left as it is.

    Raises:
        NoKernelError: nothing was replaced; the message says why for each operator.
        BackendError: no backend of that name is installed, or a kernel gives another shape or dtype than its operator.
    """
    graphs = _Graphs(exported)
    rows = tuple(graphs.lowered(node, backend) for node in graphs.neutral())
    if not rows:
        raise NoKernelError(
            "the program has no lowbit operator to lower; lower it before run_decompositions, which takes them apart"
        )
    if not any(row.kernel for row in rows):
        told = "\n".join(f"  {row.name}, {row.op}: {reason}" for row in rows for reason in row.refusals)
        raise NoKernelError(f"no operator was lowered to {backend!r}:\n{told}")
    return Lowered(graphs.program(), rows)


class _Graphs:
    """A copy of the program's graph, rewritten node by node."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.module: GraphModule = copy.deepcopy(exported.graph_module)
        self.graph = self.module.graph
        # A copy renames nodes that are called like a builtin, `input` for one, and the signature goes by names.
        for node, original in zip(self.graph.nodes, exported.graph.nodes, strict=True):
            node.name = original.name
        self.signature = copy.deepcopy(exported.graph_signature)
        self.state: dict[str, Any] = dict(exported.state_dict)
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        self.specs = dict(zip(placeholders, self.signature.input_specs, strict=True))
        self.before = next((n for n, spec in self.specs.items() if spec.kind is InputKind.USER_INPUT), placeholders[-1])
        mutated = {*self.signature.buffers_to_mutate.values()}
        self.values: dict[Node, Any] = {
            node: self._held(spec)
            for node, spec in self.specs.items()
            if spec.kind in _HELD and spec.target not in mutated
        }
        fake = detect_fake_mode([_value(node) for node in placeholders])
        assert fake is not None
        self.fake = fake
        self.packed: dict[tuple[object, ...], tuple[list[Node], Description]] = {}

    def neutral(self) -> list[Node]:
        """Neutral operators, in order; those of branches and loops too."""
        graphs = [module.graph for module in self.module.modules() if isinstance(module, GraphModule)]
        return [node for graph in graphs for node in graph.nodes if _op(node) is not None]

    def lowered(self, node: Node, backend: str) -> Lowering:
        """Replace one node, if the backend takes its call."""
        op = _op(node)
        assert op is not None
        call = Call.of(op, *_call_of(node, op))
        activation = None if call.activation is None else str(call.activation)
        row = Lowering(
            self._name(node), op, str(call.format), activation, None, packed=False, operators=(), refusals=()
        )
        if node.graph is not self.graph:
            return _stays(row, "it stands in a branch or a loop of the program, where weights cannot be packed")
        try:
            chosen = select(call, prefer=(backend,))
        except NoKernelError as error:
            return _stays(row, str(error))
        kernel = chosen.kernel
        if kernel.pack is not None and (missing := self._not_held(node)):
            return _stays(row, f"{kernel.name} packs weights, and {missing} is not a constant of the program")
        operators = self._replace(node, kernel)
        if isinstance(operators, str):
            return _stays(row, operators)
        told = tuple(map(str, chosen.refusals))
        return replace(row, kernel=kernel.name, packed=kernel.pack is not None, operators=operators, refusals=told)

    def program(self) -> ExportedProgram:
        """What was made, without weights that nothing uses any more."""
        for node in reversed(list(self.graph.nodes)):
            if node in self.values and not node.users:
                spec = self.specs.pop(node, None)
                if spec is not None and spec.target is not None:
                    self.state.pop(spec.target, None)
                self.graph.erase_node(node)
        self.signature.input_specs = [self.specs[node] for node in self.graph.find_nodes(op="placeholder")]
        self.graph.lint()
        self.module.recompile()
        old = self.exported
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state,
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs,
            constants=old.constants,
            verifiers=old.verifiers,
        )

    def _held(self, spec: InputSpec) -> Any:
        held: Mapping[str, Any] = self.exported.state_dict
        name = spec.target or ""
        return held[name] if name in held else self.exported.constants[name]

    def _constant(self, node: Any) -> Any:
        """The value of a node that follows from weights alone; KeyError for others."""
        if not isinstance(node, Node):
            return node
        if node not in self.values:
            if node.op != "call_function" or not node.all_input_nodes:
                raise KeyError(node)
            args, kwargs = map_arg((node.args, node.kwargs), self._constant)
            with torch.no_grad():
                function: Any = node.target
                self.values[node] = function(*args, **kwargs)
        return self.values[node]

    def _parts(self, node: Node) -> dict[str, Any]:
        """The weight's arguments of a linear or embedding, by name."""
        return {name: argument for name, argument in _arguments(node).items() if name in INNER}

    def _not_held(self, node: Node) -> str:
        for name, part in self._parts(node).items():
            try:
                self._constant(part)
            except KeyError:
                return name
        return ""

    def _name(self, node: Node) -> str:
        """The name under which the program holds the operator's weight."""
        at: Any = self._parts(node).get("qdata")
        while isinstance(at, Node):
            if at in self.specs:
                return self.specs[at].target or at.name
            at = next(iter(at.all_input_nodes), None)
        return node.name

    def _replace(self, node: Node, kernel: Kernel) -> tuple[str, ...] | str:
        """Put what the kernel runs in the place of the node: names of its operators, or why that cannot be."""
        arguments = _arguments(node)
        if kernel.pack is None:
            nodes = [argument for argument in arguments.values() if isinstance(argument, Node)]

            def run(*tensors: Tensor) -> Any:
                left = iter(tensors)
                given: dict[str, Any] = {n: next(left) if isinstance(a, Node) else a for n, a in arguments.items()}
                for scale, fmt in SCALES.items():
                    if given.get(scale) is not None:
                        given[scale] = typed(given[scale], given[fmt])
                return kernel.run(*given.values())
        else:
            (x, *_), other = arguments.values(), arguments.get("offs", arguments.get("bias"))
            parts, description = self._pack(node, kernel)
            nodes = [x, *parts, *([] if other is None else [other])]

            def run(*tensors: Tensor) -> Any:
                x, *rest = tensors
                return kernel.run(x, tuple(rest[: len(parts)]), description, None if other is None else rest[-1])

        try:
            with self.fake, torch.no_grad():
                traced = make_fx(run)(*map(_value, nodes))
        except Exception as error:  # noqa: BLE001 - whatever a stranger's kernel raises is told
            return f"{kernel.name} does not trace into operators: {type(error).__name__}: {error}"
        return self._inline(node, nodes, traced, kernel)

    def _pack(self, node: Node, kernel: Kernel) -> tuple[list[Node], Description]:
        """Buffers with what the kernel makes of the node's weight; tied weights are packed once."""
        inner = {name: self._constant(part) for name, part in self._parts(node).items()}
        key = (kernel.name, *map(id, inner.values()))
        if key not in self.packed:
            op = _op(node)
            assert op is not None
            assert kernel.pack is not None
            fmt, activation, _, dtype, _, k, *_ = _call_of(node, op)
            assert k is not None
            weight = QuantizedTensor.from_parts(
                inner["qdata"],
                Scales(typed(inner["scale"], fmt), inner["zero"], inner["tensor_scale"]),
                Format.parse(fmt),
                k=k,
                dtype=dtype,
                activation=Activation.parse(activation) if activation else None,
                **{name: inner[name] for name in ("act_scale", "act_zero", "pre_scale") if inner.get(name) is not None},
            )
            description = Description(weight.storage_layout, tuple(weight.inner_tensors()), tuple(weight.shape))
            with torch.no_grad():
                parts = kernel.pack(weight)
            buffers = [self._buffer(f"{self._name(node)}.{kernel.name}.part{i}", part) for i, part in enumerate(parts)]
            self.packed[key] = buffers, description
        return self.packed[key]

    def _inline(self, node: Node, nodes: Sequence[Node], traced: GraphModule, kernel: Kernel) -> tuple[str, ...]:
        """Copy what was traced from `nodes` in front of `node`, and use its results in place of the node's."""
        here, operators = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True)), []
        results: Any = None
        for step in traced.graph.nodes:
            if step.op == "get_attr":
                # A table that the kernel keeps, for example.
                here[step] = self._buffer(f"{kernel.name}.{step.target}", getattr(traced, step.target))
            elif step.op == "call_function":
                with self.graph.inserting_before(node):
                    here[step] = self.graph.node_copy(step, here.__getitem__)
                here[step].meta |= {
                    key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta
                }
                if isinstance(step.target, OpOverload) and step.target.namespace != "aten":
                    operators.append(step.target.name())
            elif step.op == "output":
                results = map_arg(step.args[0], here.__getitem__)
        _check(kernel, _value(node), map_arg(results, _value))
        if isinstance(results, (list, tuple)):
            for user in list(node.users):
                index: Any = user.args[1]
                self._stand_in(user, results[index])
            self.graph.erase_node(node)
        else:
            self._stand_in(node, results)
        return tuple(dict.fromkeys(operators))

    def _stand_in(self, node: Node, other: Node) -> None:
        node.replace_all_uses_with(other)
        self.signature.replace_all_uses(node.name, other.name)
        self.graph.erase_node(node)

    def _buffer(self, name: str, value: Tensor) -> Node:
        """A placeholder for a tensor that the program holds."""
        target = name.replace(".", "_")
        while target in self.state:
            target += "_"
        with self.graph.inserting_before(self.before):
            node = self.graph.placeholder(f"b_{target}")
        node.meta["val"] = self.fake.from_tensor(value, static_shapes=True)
        self.state[target] = value
        self.specs[node] = InputSpec(InputKind.BUFFER, TensorArgument(node.name), target, persistent=True)
        return node


def _op(node: Node) -> str | None:
    """The neutral op that a node calls."""
    name, dot, op = str(node.target).partition(".")
    return op.partition(".")[0] if node.op == "call_function" and dot and name == "lowbit" else None


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments by name, in the order of the schema; of what was left out, what it is then."""
    target: Any = node.target
    names = argument_names(target)
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    left_out = {argument.name: argument.default_value for argument in target._schema.arguments}  # noqa: SLF001 - as there
    return {name: given.get(name, left_out[name]) for name in names}


def _call_of(
    node: Node, op: str
) -> tuple[str, str, torch.device, torch.dtype, int | None, int | None, *tuple[str, ...]]:
    return call_of(op, [_value(argument) for argument in _arguments(node).values()])


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else argument


def _check(kernel: Kernel, wanted: Any, found: Any) -> None:
    several = isinstance(wanted, (list, tuple))
    pairs = list(zip(wanted if several else [wanted], found if several else [found], strict=True))
    for one, other in pairs:
        if (other.shape, other.dtype) != (one.shape, one.dtype):
            raise BackendError(
                f"kernel {kernel.name} gives {other.dtype} of shape {tuple(other.shape)} where its operator gives "
                f"{one.dtype} of shape {tuple(one.shape)}"
            )


def _stays(row: Lowering, reason: str) -> Lowering:
    return replace(row, refusals=(reason,))
