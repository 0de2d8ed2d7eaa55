"""What earlier versions wrote, this one reads, and it stands for the same numbers.

The folders of `upgrades` are named after the versions that wrote them; what each file stands for was decoded then, by
`decoding.py` or the gguf package, and lies beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit
from lowbit_hf import load
from lowbit_hf.hub import find_model
from lowbit_moe import AdamW

ROOT = Path(__file__).parent / "upgrades"
VERSIONS = sorted(folder.name for folder in ROOT.iterdir() if (folder / "values.npz").exists())
CHECKPOINTS = sorted(file.parent.relative_to(ROOT).as_posix() for file in ROOT.glob("*/*/values.npz"))
# Products of three numbers in float32.
ROUNDING = 2**-22


def values(folder):
    with np.load(folder / "values.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=0)


def test_there_are_files_of_every_kind():
    assert VERSIONS
    for version in VERSIONS:
        assert sum(name.startswith(f"{version}/") for name in CHECKPOINTS) >= 15


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name):
    state = load(find_model(str(ROOT / name))).state_dict()
    for parameter, wanted in values(ROOT / name).items():
        assert isinstance(state[parameter], lowbit.QuantizedTensor)
        same(state[parameter].dequantize(torch.float32), wanted)


@pytest.mark.parametrize("version", VERSIONS)
def test_tensors_and_states(version):
    wanted = values(ROOT / version)
    saved = torch.load(ROOT / version / "states.pt", weights_only=True)
    for tensors in (lowbit.load(ROOT / version / "tensors.safetensors"), saved["tensors"]):
        assert tensors.keys() == wanted.keys() - {"exp_avg", "exp_avg_sq"}
        for name, tensor in tensors.items():
            same(tensor.dequantize(torch.float32), wanted[name])
    parameter = torch.nn.Parameter(torch.zeros(8, 64))
    plain = AdamW([parameter], bits=32)
    plain.load_state_dict(saved["optimizer"])
    for name in ("exp_avg", "exp_avg_sq"):
        same(plain.state[parameter][name], wanted[name])
