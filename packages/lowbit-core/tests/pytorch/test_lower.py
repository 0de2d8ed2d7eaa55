"""lowbit.lower: a backend's operators in C++ on packed weights, in a program that runs without lowbit or the backend."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from cells import OTHERS, ROWS, inputs, model
from test_export import TOKENS, exported, targets
from tolerance import assert_computed
from torch import nn
from torch.nn import functional
from torch.utils import cpp_extension

import lowbit as lb
from lowbit.backends import Kernel
from lowbit.testing import installed_backends

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
SOURCE = Path(__file__).parent / "int8_rows.cpp"
ROW = next(row for row in ROWS if str(row) == "int4-g128-2d")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The operator, compiled against torch's stable ABI and loaded."""
    path = tmp_path_factory.mktemp("library") / "int8_rows.so"
    include = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    torch_folder = Path(torch.__file__).parent / "lib"
    command = ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", *include, str(SOURCE), "-o", str(path)]
    subprocess.run([*command, f"-L{torch_folder}", "-ltorch", "-ltorch_cpu", "-lc10"], check=True, timeout=300)
    torch.ops.load_library(path)
    torch.library.register_fake("int8_rows::linear", lambda x, codes, *_: x.new_empty((*x.shape[:-1], codes.shape[1])))
    return path


class Int8Rows:
    """A backend of one kernel that packs, in C++, and others that a test adds."""

    name = "int8_rows"

    def __init__(self, *others):
        self.others = others

    def probe(self):
        return None

    def kernels(self):
        row = Kernel("int8_rows.linear", "linear", "cpu", 10, run, refuses, pack, unpack)
        return (row, *self.others)


def refuses(call):
    return None if call.format == lb.INT8_ROW and call.activation is None else f"needs INT8_ROW, not {call.format}"


def pack(weight):
    return weight.qdata.t().contiguous(), weight.scale.flatten()


def unpack(parts, description):
    codes, scale = parts
    return {"qdata": codes.t().contiguous(), "scale": scale.view(-1, 1)}


def run(x, parts, description, bias):
    return torch.ops.int8_rows.linear(x, *parts, bias)


class Net(nn.Module):
    """Two int8 layers with one weight, and an int4 one, which the backend refuses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.out = nn.Linear(128, 128), nn.Linear(128, 128, bias=False), nn.Linear(128, 64)
        self.up.weight = self.down.weight = parameter(self.up.weight, "INT8_ROW")
        self.out.weight = parameter(self.out.weight, "INT4_G128")

    def forward(self, input):  # noqa: A002 - a name that a copied graph would change
        return self.out(self.down(functional.silu(self.up(input))))


def parameter(weight, fmt):
    return nn.Parameter(lb.quantize(weight.detach(), fmt), requires_grad=False)


@pytest.fixture
def net(library):
    made = Net()
    program = torch.export.export(made, (torch.randn(3, 128),), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
    return made, program


def assert_near(made, run):
    """Within the rounding of three sums of 128 float32 terms."""
    for m in TOKENS:
        x = torch.randn(m, 128, generator=torch.Generator().manual_seed(m))
        with torch.no_grad():
            wanted, found = made(x), run(x)
        assert float((found - wanted).abs().max()) <= 3 * 128 * 2.0**-24 * float(wanted.abs().max())


def test_what_the_backend_takes_is_replaced_and_packed_once(net):
    made, program = net
    before = str(program)
    with installed_backends(Int8Rows()):
        lowered = lb.lower(program, "int8_rows")
    assert str(program) == before
    assert targets(lowered.program).count("int8_rows.linear.default") == 2
    assert targets(lowered.program).count("lowbit.linear.default") == 1
    held = lowered.program.state_dict
    # Of two names for one weight, torch calls it by the last.
    assert sorted(held) == [
        "down_weight_int8_rows_linear_part0", "down_weight_int8_rows_linear_part1", "out.bias", "out.weight", "up.bias",
    ]  # fmt: skip
    assert torch.equal(held["down_weight_int8_rows_linear_part0"], made.up.weight.qdata.t())
    assert [(row.kernel, row.packed, row.operators) for row in lowered.rows] == [
        ("int8_rows.linear", True, ("int8_rows::linear",)),
        ("int8_rows.linear", True, ("int8_rows::linear",)),
        (None, False, ()),
    ]
    assert "needs INT8_ROW, not int4:1x128:bfloat16" in lowered.rows[2].refusals[0]
    lines = str(lowered).splitlines()
    assert lines[1].split() == [
        "down.weight", "linear", "int8:1x*:float32", "int8_rows.linear", "(packed)", "int8_rows::linear",
    ]  # fmt: skip
    assert lines[3].split() == ["out.weight", "linear", "int4:1x128:bfloat16", "none", "aten"]
    assert any(line.startswith("out.weight stays linear: ") for line in lines)
    assert [row["kernel"] for row in json.loads(lowered.to_json())] == ["int8_rows.linear"] * 2 + [None]
    assert_near(made, lowered.program.module())


def test_it_saves_loads_and_runs_without_lowbit(net, library, run_elsewhere, tmp_path):
    made, program = net
    with installed_backends(Int8Rows()):
        lowered = lb.lower(program, "int8_rows").program
    torch.export.save(lowered, tmp_path / "lowered.pt2")
    again = torch.export.load(tmp_path / "lowered.pt2")
    assert targets(again).count("int8_rows.linear.default") == 2
    assert_near(made, again.module())
    apart = again.run_decompositions()
    assert targets(apart).count("int8_rows.linear.default") == 2
    assert not [target for target in targets(apart) if "lowbit" in target]
    package = torch._inductor.aoti_compile_and_package(again, package_path=f"{tmp_path}/package.pt2")
    assert_near(made, lambda x: run_elsewhere(package, [(x,)], [library])[0])


# The operators of the other rows are taken apart in test_export.
@pytest.mark.parametrize("row", OTHERS, ids=str)
def test_a_kernel_of_aten_operators_is_inlined(row):
    made = model(row)
    lowered = lb.lower(exported(row, made), "reference")
    assert not [target for target in targets(lowered.program) if target.startswith("lowbit.")]
    assert all(row.kernel.startswith("reference.") and not row.operators for row in lowered.rows)
    for m in TOKENS:
        with torch.no_grad():
            assert_computed(row, made, lowered.program.module()(*inputs(row, m)), inputs(row, m))


def added(run, priority=20):
    return Kernel("int8_rows.added", "linear", "cpu", priority, run, lambda _: None)


def test_what_does_not_trace_stays_with_its_reason():
    def reads(x, qdata, scale, *rest):
        return x.new_full((x.shape[0], qdata.shape[0]), float(scale.max()))

    program = exported(ROW, model(ROW))
    with (
        installed_backends(Int8Rows(added(reads))),
        pytest.raises(lb.NoKernelError, match=r"up.weight, linear: int8_rows.added does not trace into operators: "),
    ):
        lb.lower(program, "int8_rows")


def test_a_kernel_of_the_wrong_shape_is_an_error():
    program = exported(ROW, model(ROW))
    with (
        installed_backends(Int8Rows(added(lambda x, qdata, *rest: x * 2))),
        pytest.raises(lb.BackendError, match=r"int8_rows.added gives torch.float32 of shape .*256.* where .*512"),
    ):
        lb.lower(program, "int8_rows")


def test_a_table_that_a_kernel_keeps_becomes_a_buffer():
    table = torch.linspace(0, 1, 512)
    dense = next(kernel for kernel in lb.backends.installed()["reference"].kernels if kernel.op == "linear").run
    made = model(ROW)
    with installed_backends(Int8Rows(added(lambda x, qdata, *rest: dense(x, qdata, *rest) + table[: qdata.shape[0]]))):
        lowered = lb.lower(exported(ROW, made), "int8_rows").program
    x = torch.randn(5, 256)
    with torch.no_grad():
        wanted = made.down(functional.silu(made.up(x) + table)) + table[:256]
        torch.testing.assert_close(lowered.module()(x), wanted, rtol=0, atol=512 * 2.0**-24 * float(wanted.abs().max()))
    assert [name for name in lowered.state_dict if name.startswith("int8_rows")]


def test_weights_that_come_with_each_call_are_not_packed(library):
    class Given(nn.Module):
        def forward(self, x, weight):
            return functional.linear(x, weight)

    weight = lb.quantize(torch.randn(8, 128), "INT8_ROW")
    program = torch.export.export(Given(), (torch.randn(2, 128), weight))
    with (
        installed_backends(Int8Rows()),
        pytest.raises(lb.NoKernelError, match="packs weights, and qdata is not a constant of the program"),
    ):
        lb.lower(program, "int8_rows")


def test_nothing_to_lower_and_no_such_backend_are_told():
    program = exported(ROW, model(ROW))
    with pytest.raises(lb.BackendError, match="names the backend 'moon', which is not installed"):
        lb.lower(program, "moon")
    with pytest.raises(lb.NoKernelError, match="has no lowbit operator to lower; lower it before run_decompositions"):
        lb.lower(program.run_decompositions(), "reference")
