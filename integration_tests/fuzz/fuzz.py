"""Coverage-guided fuzzing of one parser by atheris: `python fuzz.py TARGET CORPUS... [libFuzzer's options]`.

Started from `corpus/TARGET`, which `test_fuzz.py` runs too. What crashes is written to the working directory; add it to
the corpus with the fix. `nox -s fuzz` does all targets.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

# The targets of `hostile.py`; `parsers.py` has the others.
CHECKPOINTS = ("header", "index", "config", "gguf")

# Where `hostile` finds checkpoints of other libraries.
sys.path.append(str(Path(__file__).parents[2] / "packages/lowbit-hf/tests"))
# Only what is fuzzed: torch and transformers take minutes to instrument, and their coverage says nothing of lowbit.
_CHECKPOINTS = ["lowbit", "lowbit_hf"]
_TEXTS = [
    f"lowbit.{name}" for name in ("activation", "attention", "bench", "checkpoint", "element", "format", "journal")
]
_TEXTS += ["lowbit.page", "lowbit.recipe", "lowbit.report", "lowbit.rules", "lowbit.staging", "lowbit_algos.method"]
_TEXTS += ["lowbit_hf.commands", "lowbit_hf.release", "lowbit_hf.schemes", "lowbit_hf.texts", "lowbit_moe.recipe"]
with atheris.instrument_imports(include=_CHECKPOINTS if sys.argv[1] in CHECKPOINTS else _TEXTS):
    import hostile
    import parsers

# Whose inputs are JSON.
_JSON = ("config", "index", "recipe", "report", "results", "stored", "speeds")


def main() -> None:
    """Fuzz the target that is named first, in a folder that is like a checkpoint but for the file in question."""
    name = sys.argv.pop(1)
    root = Path(tempfile.mkdtemp(prefix="lowbit-fuzz-"))
    if name in hostile.TARGETS:
        folders = hostile.made(root / "sound")
        work = {kind: shutil.copytree(folder, root / "work" / kind) for kind, folder in folders.items()}
    else:
        work = {"plain": root}
    target = (hostile.TARGETS | parsers.TARGETS)[name]
    options = {"custom_mutator": mutate} if name in _JSON else {}
    atheris.Setup(sys.argv, lambda data: target(data, work), **options)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(root)


def mutate(data: bytes, size: int, seed: int) -> bytes:
    """Half of the time change the value that a JSON text stands for, else its bytes."""
    draw = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if value is None or draw.random() < 0.5:
        return atheris.Mutate(data, size)
    return hostile.mutated(value, draw).encode(errors="replace")[:size]


if __name__ == "__main__":
    main()
