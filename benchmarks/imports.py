"""What `import lowbit` adds to `import torch`: seconds, and the modules they go to.

    python benchmarks/imports.py --runs 15 --json benchmarks/imports.json

Every run is a process of its own. The first one compiles lowbit; the others find its bytecode, as they do once it is
installed, and their median is the figure. Seconds of each module are its own, without those it imports; a collection of
torch's garbage counts for the module that happens to set it off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHILD = """
import json, sys, time
begun = time.perf_counter()
import torch
done = time.perf_counter()
modules = set(sys.modules)
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
start = time.perf_counter()
import lowbit
end = time.perf_counter()
new = sorted(set(sys.modules) - modules)
print(json.dumps({"torch": torch.__version__, "torch_s": done - begun, "lowbit_s": end - start, "modules": new}))
"""


def main() -> None:
    """Measure, tell and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as bytecode:
        first, _ = measure(bytecode)
        runs = [measure(bytecode)[0] for _ in range(options.runs)]
        timed, log = measure(bytecode, "-X", "importtime")
    own = {name: seconds for name, seconds in own_seconds(log).items() if name in timed["modules"]}
    result = {
        "benchmark": "imports",
        "machine": machine() | {"torch": first["torch"]},
        "lowbit_s": statistics.median(run["lowbit_s"] for run in runs),
        "torch_s": statistics.median(run["torch_s"] for run in runs),
        "compiling_s": first["lowbit_s"],
        "runs_s": [run["lowbit_s"] for run in runs],
        "modules_s": dict(sorted(own.items(), key=lambda item: -item[1])),
    }
    sys.stdout.write(
        f"import lowbit: {result['lowbit_s']:.3f} s above import torch ({result['torch_s']:.2f} s, {first['torch']}), "
        f"{first['lowbit_s']:.3f} s when it compiles; {len(own)} new modules\n"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(bytecode: str, *flags: str) -> tuple[dict[str, Any], str]:
    """One import in a fresh process that keeps lowbit's bytecode in a folder, and what it wrote to stderr."""
    child = [sys.executable, *flags, "-c", CHILD, bytecode]
    done = subprocess.run(child, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), done.stderr


def own_seconds(log: str) -> dict[str, float]:
    """Seconds of each module itself, from lines such as `import time:  123 |  456 |  module` in microseconds."""
    rows = [
        line.removeprefix("import time:").split("|") for line in log.splitlines() if line.startswith("import time:")
    ]
    return {name.strip(): int(own) / 1e6 for own, _, name in rows if own.strip().isdigit()}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.processor())
    python, date = platform.python_version(), datetime.now(UTC).date().isoformat()
    return {"cpu": cpu, "cores": os.cpu_count(), "python": python, "date": date}


if __name__ == "__main__":
    main()
