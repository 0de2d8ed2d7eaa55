"""Benchmarks that take no longer than their tests need."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

import pytest

from lowbit.bench import ceilings, command, timing


@pytest.fixture
def small(monkeypatch):
    """Ceilings and copies of a few kilobytes."""
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": ((1 << 16,), 32)})
    monkeypatch.setattr(timing, "_ROTATED", 1 << 16)


@pytest.fixture
def bench(small, tmp_path, capsys):
    """`bench(name, ...)`: the exit code, the results read back, and what was printed."""

    def run(*argv):
        file = tmp_path / "results.json"
        code = command.main([*argv, "--seconds", "0.001", "--device", "cpu", "--json", f"{file}"])
        return code, json.loads(file.read_text()), capsys.readouterr()

    return run


@pytest.fixture
def contender():
    """`contender(role, name, seconds, ...)`: what a file of results has of one; quartiles 1 % around the median."""

    def make(role, name, seconds, *, spread=0.02, samples=100, sqnr=(30.0, 20.0), moved=1e6, **more):
        quartiles = [seconds * (1 - spread / 2), seconds * (1 + spread / 2)]
        accuracy = {kind: {"exact": value} for kind, value in zip(("normal", "outliers"), sqnr, strict=False)}
        told = {"role": role, "name": name, "kernel": "cuda.linear" if role == "candidate" else None}
        told |= {"moved_bytes": moved, "sqnr": accuracy, "refusals": [], "seconds": seconds, "quartiles": quartiles}
        return told | {"samples": samples, "note": ""} | more

    return make


@pytest.fixture
def results():
    """`results([(case, flops, contenders), ...], ...)`: a file of results, as a run would write it."""

    def make(rows, *, benchmark="linear", device="a GPU", clocks=(), **changes):
        told = {"device": device, "date": "2026-11-27", "clocks": dict(clocks), "versions": {"torch": "2.11"}}
        # They meet at 100 operations a byte.
        ceilings = {"bytes_per_s": 1e12, "copied": 2**30, "flops_per_s": 1e14, "side": 8192, "dtype": "bfloat16"}
        made = {"version": 1, "benchmark": benchmark, "shapes_seed": None, "environment": told, "ceilings": ceilings}
        made["rows"] = [{"case": case, "flops": flops, "contenders": each} for case, flops, each in rows]
        return made | changes

    return make


@pytest.fixture
def plots():
    """`plots(markup)`: of every plot its title, its axes' titles, and by what is told of each marker where it stands.

    Places are values, read off the ticks: by their logarithm where a base is given, `plots(markup, x=2, y=10)`.
    """

    def read(markup, x=None, y=None):
        found = [ET.fromstring(svg) for svg in re.findall(r'<svg [^>]*class="plot.*?</svg>', markup, re.DOTALL)]
        return [_plot(svg, x, y) for svg in found]

    return read


def _plot(svg, x, y):
    texts = [text for text in svg.iter("text") if text.get("class") is None]
    across = _scale([(float(t.get("x")), t.text) for t in texts if t.get("text-anchor") == "middle"], x)
    down = _scale([(float(t.get("y")) - 4, t.text) for t in texts if t.get("text-anchor") == "end"], y)
    points = {}
    for group in svg.iter("g"):
        for path in group:
            if (told := path.find("title")) is not None:
                left, top = map(float, re.findall(r"[-\d.]+", path.get("transform")))
                points[told.text] = (across(left), down(top), group.get("class"))
    return {
        "title": svg.find("title").text,
        "class": svg.get("class"),
        "axes": [text.text for text in svg.iter("text") if text.get("class") == "axis"],
        "points": points,
    }


def _scale(ticks, base):
    """What a place is worth, by the first and the last tick; None where there are not two."""
    ends = sorted({at: _number(text) for at, text in ticks}.items())
    if len(ends) < 2:
        return lambda at: None
    (first, low), (last, high) = ends[0], ends[-1]
    if base is None:
        return lambda at: low + (high - low) * (at - first) / (last - first)
    return lambda at: low * (high / low) ** ((at - first) / (last - first))


def _number(text):
    if power := re.fullmatch("2([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text):
        return 2.0 ** int(power[1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    over, _, under = text.replace("\N{MINUS SIGN}", "-").partition("/")
    digits, _, prefix = over.partition("\N{NO-BREAK SPACE}")
    return float(digits) * 1000 ** " kMGTP".index(prefix or " ") / float(under or 1)
