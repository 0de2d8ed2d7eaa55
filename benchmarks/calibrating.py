"""How much memory, and how long, `lowbit quantize --max-memory` takes for a checkpoint that is larger than that memory.

    python benchmarks/calibrating.py --gib 8.2 --max-memory 4GiB --json benchmarks/calibrating.json

makes a Llama-shaped bfloat16 checkpoint of random weights (kept in --work for the next run), and quantizes it by GPTQ
in a process of its own, whose peak the system tells when it ends; with --ranks in so many, of which that is the
largest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from streaming import machine, make, size

SHIPPED = Path("integration_tests/models")


def main() -> None:
    """Make the checkpoint, run the command, tell and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.2)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-memory", default="4GiB")
    parser.add_argument("--ranks", type=int, default=1, help="processes that calibrate together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint and its output; default: a temporary one")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        model, out = work / f"llama-{given.gib:g}GiB", work / f"out-{given.scheme}"
        if not model.exists():
            make(model, given.gib)
            for path in (SHIPPED / "lm-tiny").glob("tokenizer*"):
                shutil.copy(path, model)
        shutil.rmtree(out, ignore_errors=True)
        command = [
            *_started(given.ranks),
            "quantize",
            str(model),
            "--to",
            given.scheme,
            "-o",
            str(out),
        ]
        command += ["--algorithm", given.algorithm, "--calibrate", str(SHIPPED / "calibration.txt"), "--device"]
        command += [given.device]
        command += ["--samples", str(given.samples), "--seq-len", "512", "--max-memory", given.max_memory]
        start = time.perf_counter()
        _, status, used = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
        seconds = time.perf_counter() - start
        if status:
            sys.exit(f"the command failed: {' '.join(command)}")
        report = json.loads((out / "report.json").read_text())
        told = {
            "benchmark": "calibrating",
            "input_gib": size(model) / 2**30,
            "scheme": given.scheme,
            "algorithm": given.algorithm,
            "tokens": given.samples * 512,
            "seconds": seconds,
            "block_seconds": [block["seconds"] for block in report["blocks"]],
            "ranks": given.ranks,
            "device": given.device,
            "max_memory": given.max_memory,
            "planned_gib": report["planned_memory"] / 2**30,
            # Kilobytes, of the process as the system saw it.
            "peak_gib": used.ru_maxrss / 2**20,
            # Of the first process's GPU; None: there is none.
            "peak_gpu_gib": report["peak_gpu"] and report["peak_gpu"] / 2**30,
            "machine": machine(),
        }
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
    if given.json:
        given.json.write_text(json.dumps(told, indent=2) + "\n")


def _started(ranks: int) -> list[str]:
    """What starts the command in so many processes."""
    lowbit = shutil.which("lowbit") or sys.exit("the lowbit command is not on PATH")
    if ranks == 1:
        return [lowbit]
    torchrun = shutil.which("torchrun") or sys.exit("torchrun is not on PATH")
    return [torchrun, "--nproc-per-node", str(ranks), "--no-python", lowbit]


if __name__ == "__main__":
    main()
