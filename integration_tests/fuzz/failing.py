"""Kill every command that writes, and let its disk run full: `python failing.py kills|disks COUNT LOG.json`.

Each run of a command is a fork of this process, which has imported everything, so that hundreds take minutes. Whatever
happens to it, no output may look finished and be something else, and the same command afterwards makes the bytes that
an undisturbed run makes, without doing again what its journal vouches for. Disks are small ones of their own (tmpfs),
which only root can mount.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowbit import command, journal, staging
from lowbit.bench import ceilings

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": 32, "max_position_embeddings": 128}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# What tells of a run's time, or hashes it.
_TIMED = ("report.json", "report.html", "SHA256SUMS")
# What commands put beside an output in the making, and make again or continue.
_UNFINISHED = (".partial", ".replaced", ".unfinished.json")


@dataclass(frozen=True)
class Line:
    """A command that makes `out` (a file or a folder) in a folder of its own."""

    words: tuple[str, ...]
    out: str = "out"
    # Whether two runs make the same bytes.
    same: bool = True
    # Whether it takes seconds, so that it is killed half as often.
    slow: bool = False

    def argv(self, place: Path) -> list[str]:
        """The arguments, with the output in `place`."""
        return [str(place / self.out) if word == "@out" else word for word in self.words]


@dataclass
class Tally:
    """What was seen of one command."""

    seconds: float = 0.0
    runs: int = 0
    # Runs whose output was there already, and runs of which something was kept and not redone.
    whole: int = 0
    continued: int = 0
    moments: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


def lines(root: Path) -> dict[str, Line]:
    """Every command that writes, on a small model and text that are made in `root`."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(root / "model", max_shard_size="200KB")
    letters = Tokenizer(models.BPE({"</s>": 0} | {chr(96 + i): i for i in range(1, 27)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>").save_pretrained(root / "model")
    draw = random.Random(0)
    (root / "text.txt").write_text("".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(4000)))
    model, text, quantized = str(root / "model"), str(root / "text.txt"), str(root / "W4A16_G32")
    made = ("-o", "@out")
    data = ("--calibrate", text, "--samples", "4", "--seq-len", "32")
    assert command.main(["quantize", model, "--to", "W4A16_G32", "-o", quantized]) == 0
    brief = ("--device", "cpu", "--seconds", "0.01")
    few = ("--text", text, "--tokens", "64")
    return {
        "quantize": Line(("quantize", model, "--to", "W8A16", *made)),
        "quantize, lowbit's layout": Line(("quantize", model, "--to", "MXFP8", "--layout", "lowbit", *made)),
        "quantize by gptq": Line(
            ("quantize", model, "--to", "W4A16_G32", "--algorithm", "gptq", *data, *made), slow=True
        ),
        "quantize by awq": Line(
            ("quantize", model, "--to", "W4A16_G32", "--algorithm", "awq", *data, *made), slow=True
        ),
        "export as gptq": Line(("export", quantized, "--as", "gptq", *made)),
        "export as gguf": Line(("export", quantized, "--as", "gguf", "--pre", "llama-bpe", *made)),
        "dequantize": Line(("dequantize", quantized, *made)),
        "synthesize": Line(
            ("synthesize", model, "--from", text, "--samples", "40", "--seq-len", "99", "-o", "@out"), "out.jsonl"
        ),
        "compare": Line(("compare", model, "--to", "W8A16", "--to", "W4A16_G32", *few, *made)),
        "release": Line(
            ("release", model, "--to", "W4A16_G32", "--algorithm", "rtn", "--gpu", "sm90", *few, *made), slow=True
        ),
        "bench": Line(
            ("bench", "cast", "--formats", "MXFP8", "--shapes", "32x64,64x64", *brief, "--json", "@out"),
            "out.json",
            same=False,
            slow=True,
        ),
    }


def start(argv: list[str], place: Path, prepare: Callable[[], None] | None = None) -> int:
    """The process id of a fork that runs the command; what it says goes to `place.log`, units it does to `place.units`."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        # Every unit is synced, as those of large models are, which take longer than the 5 s between two syncs.
        journal.SYNC_BYTES = 0
        units, done = os.open(place.with_suffix(".units"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), journal.Journal.done

        def noted(self: journal.Journal, unit: str) -> None:
            os.write(units, f"{self.folder.name} {unit}\n".encode())
            done(self, unit)

        journal.Journal.done = noted
        if prepare is not None:
            prepare()
        sys.argv = ["lowbit", *argv]
        code = command.main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 70
    except BaseException:  # noqa: BLE001 - told, and an exit code that no command has
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(argv: list[str], place: Path, prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    """Exit code of an undisturbed fork, and what it said."""
    _, status = os.waitpid(start(argv, place, prepare), 0)
    return os.waitstatus_to_exitcode(status), place.with_suffix(".log").read_text()


def kept(place: Path) -> set[str]:
    """The units that journals in a folder vouch for."""
    found = set()
    for path in place.rglob("journal.jsonl"):
        for text in path.read_text(errors="replace").splitlines():
            record = json.loads(text) if text.endswith("}") else {}
            if "unit" in record:
                found.add(f"{path.parent.name} {record['unit']}")
    return found


def contents(out: Path) -> dict[str, bytes] | None:
    """The bytes of an output by name, without what tells of time; None where there is none."""
    if not os.path.lexists(out):
        return None
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    names = {str(path.relative_to(out.parent)): path for path in files if path.name not in _TIMED}
    return {name: path.read_bytes() for name, path in names.items()}


def looks_finished(place: Path, line: Line, whole: Mapping[str, bytes]) -> bool:
    """Whether the output is there; it must then be whole, and nothing else may be there that somebody could use."""
    for path in place.iterdir():
        assert path.name == line.out or path.name.endswith(_UNFINISHED), path
    found = contents(place / line.out)
    if found is None:
        return False
    if line.words[0] == "compare":
        # A folder of outputs, each of them whole or not there.
        shown = {name: raw for name, raw in found.items() if not any(part.startswith(".") for part in Path(name).parts)}
        done = {Path(name).parts[1] for name in shown}
        assert shown == {name: raw for name, raw in whole.items() if Path(name).parts[1] in done}
        return shown == whole
    if not line.same:
        assert len(json.loads(found[line.out])["rows"]) == len(json.loads(whole[line.out])["rows"])
        return True
    assert found == whole
    return True


def ends_the_same(place: Path, line: Line, whole: Mapping[str, bytes], units: set[str], made: set[str]) -> None:
    """The same command again makes the output, without what was done; or says that it is there."""
    there = looks_finished(place, line, whole)
    code, said = run(line.argv(place), place)
    # A run may be killed after its last change to the disk; and what is there before a run begins is the user's.
    assert code == 0 or (there and "--overwrite" in said), said
    assert looks_finished(place, line, whole), said
    assert all(path.name == line.out for path in place.iterdir()), list(place.iterdir())
    again = set(place.with_suffix(".units").read_text().splitlines())
    twice = units & again | {unit for unit in again if unit.split()[0] in made}
    assert not twice, f"done twice: {sorted(twice)}"


def made_before(place: Path) -> set[str]:
    """The folders in which checkpoints that are whole were in the making, which must not be made again."""
    return {f".{path.parent.name}.partial" for path in place.rglob("config.json") if "files" not in path.parts}


def kill(line: Line, count: int, draw: random.Random, root: Path) -> Tally:
    """Kill the command `count` times, at moments spread over its run."""
    whole, seconds = undisturbed(line, root)
    tally = Tally(seconds=round(seconds, 2))
    while tally.runs < count:
        place = Path(tempfile.mkdtemp(dir=root))
        moment = seconds * (tally.runs + draw.random()) / count
        child = start(line.argv(place), place)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
            units, made = kept(place), made_before(place)
            tally.whole += looks_finished(place, line, whole)
            tally.continued += bool(units or made)
            tally.runs += 1
            tally.moments.append(round(moment, 3))
            ends_the_same(place, line, whole, units, made)
        else:
            # The machine has become faster.
            seconds *= 0.9
        shutil.rmtree(place)
    return tally


def fill(line: Line, count: int, draw: random.Random, root: Path) -> Tally:
    """Run the command on `count` disks that are too small, then make them larger and run it again."""
    whole, seconds = undisturbed(line, root)
    tally = Tally(seconds=round(seconds, 2))
    needed = sum(len(raw) + 8192 for raw in whole.values())
    while tally.runs < count:
        # Of whole pages, as disks are.
        size = max(4096, int(needed * (tally.runs + draw.random()) / count) // 4096 * 4096)
        # Most commands measure the disk first; that another process takes the space afterwards is every other case.
        late = tally.runs % 2 == 1
        with disk(root, size) as place:
            code, said = run(line.argv(place), place, _unmeasured if late else None)
            if code == 0:
                # Large enough after all.
                assert looks_finished(place, line, whole)
                assert needed > count, "the output is too small for any disk to be too small"
                needed = needed * 9 // 10
                continue
            assert code == (2 if "usage:" in said else 1), said
            assert "Traceback" not in said, said
            told = next(text for text in said.splitlines() if text.startswith("lowbit "))
            assert "disk" in told or "No space left" in told, told
            assert not looks_finished(place, line, whole)
            units, made = kept(place), made_before(place)
            tally.continued += bool(units or made)
            tally.runs += 1
            tally.moments.append(size)
            reason = "No space left on device" if "No space left" in told else "refused before the work"
            tally.errors[reason] = tally.errors.get(reason, 0) + 1
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            ends_the_same(place, line, whole, units, made)
    return tally


def _unmeasured() -> None:
    staging.Staging.require_space = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def disk(root: Path, size: int) -> Iterator[Path]:
    """An empty disk of `size` bytes."""
    place = Path(tempfile.mkdtemp(dir=root))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()


@cache
def undisturbed(line: Line, root: Path) -> tuple[dict[str, bytes], float]:
    """What the command makes, and the seconds it takes; two runs make the same."""
    found: list[dict[str, bytes]] = []
    for _ in range(2):
        place, started = Path(tempfile.mkdtemp(dir=root)), time.monotonic()
        code, said = run(line.argv(place), place)
        seconds = time.monotonic() - started
        assert code == 0, said
        found.append(contents(place / line.out) or {})
        shutil.rmtree(place)
    assert found[0] == found[1] or not line.same
    return found[0], seconds


def main() -> None:
    """Do one of them to every command, or to those named, and write what was seen."""
    how, count, log, *named = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # What the machine can do is not what is asked here, and takes 16 s to measure.
    ceilings._SIZES = {"cpu": ((1 << 20,), 64)}
    draw, started, found = random.Random(0), time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="lowbit-failing-") as scratch:
        all_ = lines(Path(scratch))
        for name, line in all_.items():
            if named and name not in named:
                continue
            if how == "kills":
                shares = sum(2 - each.slow for each in all_.values())
                each = -(-int(count) * (2 - line.slow) // shares)
                tally = kill(line, each, draw, Path(scratch))
            else:
                tally = fill(line, int(count), draw, Path(scratch))
            found[name] = vars(tally)
            sys.stdout.write(f"{name}: { {key: value for key, value in vars(tally).items() if key != 'moments'} }\n")
            total = {
                "runs": sum(tally["runs"] for tally in found.values()),
                "seconds": round(time.monotonic() - started),
            }
            Path(log).write_text(json.dumps({"what": how, **total, "commands": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
