"""Fuzz all targets by atheris until so many inputs were run: `python long_run.py INPUTS LOG.json`.

A target that crashes goes on with another seed, and its input is kept beside the log. Targets whose inputs the log
has already are not run again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Of a million inputs, in thousands: more for what takes less time.
SHARES = {
    "recipe": 500,
    "spec": 300,
    "speeds": 50,
    "stored": 30,
    "documents": 30,
    "report": 20,
    "header": 30,
    "gguf": 10,
    "journal": 10,
    "index": 10,
    "results": 5,
    "config": 3,
    "arguments": 2,
}
_HERE = Path(__file__).parent


def main() -> None:
    """Run them one after another, and write what was seen after each."""
    inputs, log = int(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, dict[str, object]] = json.loads(log.read_text())["targets"] if log.is_file() else {}
    for name, share in SHARES.items():
        if name in found and int(str(found[name]["inputs"])) >= inputs * share // 1000:
            continue
        found[name] = fuzz(name, inputs * share // 1000, log.parent)
        total = sum(int(str(each["inputs"])) for each in found.values())
        log.write_text(json.dumps({"what": "atheris", "inputs": total, "targets": found}, indent=1) + "\n")
        sys.stdout.write(f"{name}: {found[name]}\n")
        sys.stdout.flush()


def fuzz(name: str, wanted: int, kept: Path) -> dict[str, object]:
    """Inputs that one target ran, seconds, branches covered at the start and in the end, and what it raised."""
    done, started, first, last = 0, time.monotonic(), 0, 0
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as new:
        for seed in range(1, 20):
            if done >= wanted:
                break
            limits = [f"-runs={wanted - done}", f"-seed={seed}", "-timeout=25", "-rss_limit_mb=4096"]
            limits += ["-print_final_stats=1", "-max_len=4096", f"-artifact_prefix={kept / name}-"]
            line = [sys.executable, str(_HERE / "fuzz.py"), name, new, str(_HERE / "corpus" / name), *limits]
            told = subprocess.run(line, capture_output=True, text=True, check=False, errors="replace")
            said = told.stdout + told.stderr
            covered = [int(count) for count in re.findall(r"cov: (\d+)", said)]
            first, last = first or next(iter(covered), 0), max([last, *covered])
            ran = re.search(r"number_of_executed_units: *(\d+)", said)
            done += int(ran[1]) if ran else 0
            if told.returncode:
                raised = re.findall(r"^(\w*(?:Error|Exception)\b.*)$", said, re.MULTILINE)
                faults.append((raised or said.strip().splitlines()[-1:])[0][:200])
    seconds = round(time.monotonic() - started)
    return {"inputs": done, "seconds": seconds, "covered first": first, "covered": last, "faults": faults}


if __name__ == "__main__":
    main()
