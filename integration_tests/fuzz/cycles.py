"""Quantize, save and load a model again and again, and see that memory stays flat: `python cycles.py COUNT LOG.json`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import lowbit
from lowbit.memory import memory_in_use

# From the tenth part of the cycles to all of them, memory may grow by so many bytes: noise of the allocator.
MOST = 4 << 20
_FORMATS = ("MXFP4", "INT4_G32", "NVFP4", "FP8_ROW", "UINT4_G128", "INT8_ROW")


def cycle(number: int, path: Path) -> None:
    """One model quantized, bound to its kernels, run, saved, loaded into another and run there with the same result."""
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    rule = lowbit.Rule.of("0.weight", _FORMATS[number % len(_FORMATS)])
    lowbit.quantize_(model, lowbit.Recipe((rule,)))
    x = torch.ones(2, 128)
    with torch.no_grad():
        wanted = model(x)
        lowbit.save(model, path)
        with torch.device("meta"):
            again = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
        lowbit.load_into(again, path)
        assert torch.equal(again(x), wanted)
        lowbit.bind(again)
        again(x)


def main() -> None:
    """Run them, and write what memory was in use at each tenth."""
    count, log = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    started, used = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            cycle(number, Path(folder) / "model.safetensors")
            if number % (count // 10) == 0:
                used[number] = memory_in_use()
    first, last = used[count // 10], used[count]
    told = {"what": "cycles", "cycles": count, "seconds": round(time.monotonic() - started), "bytes in use": used}
    log.write_text(json.dumps({**told, "growth": last - first, "allowed": MOST}, indent=1) + "\n")
    assert last - first <= MOST, f"memory grew by {last - first} bytes"


if __name__ == "__main__":
    main()
