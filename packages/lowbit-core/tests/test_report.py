from __future__ import annotations

import html
import json
import math
import re
import struct
import sys
import tomllib
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.report import Block, Experts, Kept, Layer, Report, environment

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HOSTILE = "\"'><script>alert(1)</script></style></title><img src=x onerror=alert(2)>&lt;\u202e\udce9"


def _layer(block, kind, output):
    return Layer(
        name=f"model.layers.{block}.mlp.{kind}.weight",
        shape=(4096, 14336),
        format="INT4_G128",
        activation="dynamic INT8_ROW" if kind == "v_proj" else None,
        algorithm="gptq",
        bits=4.125,
        block=block,
        weight_sqnr=20 + output / 8,
        output_sqnr=output,
        kernel="reference.linear" if kind == "q_proj" else None,
        seconds=1.5,
        outliers=((7 * (block or 0) + len(kind), 10.5 + (block or 0)),),
        notes=("12 columns were dead",) if kind == "o_proj" else (),
    )


def _report(blocks=4, experts=8, **changes):
    """A report of blocks x 7 layers, whose median output SQNR is 32 dB."""
    count = blocks * len(KINDS)
    # In an order that is neither rising nor falling.
    outputs = [32 + (i * 5 % count - count // 2) / 8 for i in range(count)]
    layers = [_layer(i // len(KINDS), KINDS[i % len(KINDS)], output) for i, output in enumerate(outputs)]
    kept = [Kept(name=f"model.layers.{b}.norm.weight", bytes=8192, reason="no rule matches") for b in range(blocks)]
    values = {
        "title": "org/model",
        "scheme": "W4A16",
        "algorithm": "gptq",
        "command": "lowbit quantize org/model out --scheme W4A16",
        "layers": tuple(layers),
        "blocks": tuple(
            Block(index=b, name=f"model.layers.{b}", sqnr=40 / (1 + b / 9), seconds=9.5) for b in range(blocks)
        ),
        "experts": tuple(
            Experts(name=f"model.layers.{b}.experts.up", tokens=tuple(100 * e for e in range(experts)), fallback=(0, 1))
            for b in range(blocks if experts else 0)
        ),
        "kept": (*kept, Kept(name="lm_head.weight", bytes=1 << 20, reason="kept by rule 'lm_head'")),
        "bytes_before": 16 << 30,
        "bytes_after": 5 << 30,
        "bits_per_weight": 4.125,
        "coverage": 0.987,
        "seconds": 724.2,
        "peak_memory": 6 << 30,
        "planned_memory": 7 << 30,
        "max_memory": 8 << 30,
        "calibration": {"file": "a.jsonl", "tokens": 1048576, "share": 0.25},
        "environment": {"python": "3.11", "cpu": "a CPU"},
    }
    return Report(**(values | changes))


def _nearest(report):
    """The report of a run without calibration."""
    layers = tuple(replace(layer, output_sqnr=None, outliers=()) for layer in report.layers)
    return replace(report, layers=layers, blocks=(), experts=(), calibration={}, peak_memory=None, planned_memory=None)


class _Page(HTMLParser):
    """The elements of a page with their attributes' names, its headings, and its text."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.headings, self.text, self._open = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        # Where names may break depends on the names.
        if tag != "wbr":
            self.elements.append((tag, *(name for name, _ in attrs)))
        self._open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag):
        while self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "h2" in self._open:
            self.headings[-1] += data
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def _table(page, label):
    """The cells' texts of a table, by row, its heading first."""
    body = page.partition(f'aria-label="{label}"')[2].partition("</table>")[0]
    return [
        [html.unescape(re.sub("<.*?>", "", cell)).replace("\N{NO-BREAK SPACE}", " ") for cell in cells]
        for row in body.split("<tr>")[1:]
        if (cells := re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row))
    ]


@pytest.mark.parametrize("report", [_report(), _nearest(_report()), _report(blocks=0, experts=0, kept=())])
def test_a_report_is_read_back_as_it_was_written(report):
    text = report.to_json()
    assert Report.from_json(text) == report
    assert Report.from_json(text).to_json() == text
    written = json.loads(text)
    assert next(iter(written)) == "version"
    assert written["version"] == 1
    assert [layer["name"] for layer in written["layers"]] == [layer.name for layer in report.layers]


def test_numbers_that_are_not_finite_are_null_in_json_and_told_on_the_page():
    odd = [math.inf, -math.inf, math.nan]
    report = _report()
    layers = tuple(replace(layer, output_sqnr=x, weight_sqnr=x) for layer, x in zip(report.layers, odd, strict=False))
    report = replace(report, layers=layers + report.layers[3:], calibration={"share": math.nan})
    read = Report.from_json(report.to_json())
    assert [layer.output_sqnr for layer in read.layers[:3]] == [None] * 3
    assert all(math.isnan(layer.weight_sqnr) for layer in read.layers[:3])
    assert math.isnan(read.calibration["share"])
    assert read.layers[3:] == report.layers[3:]
    page = report.to_html()
    assert [row[1] for row in _table(page, "All layers")[1:4]] == ["∞", "\N{MINUS SIGN}∞", "\N{EN DASH}"]
    # What is no number at all comes before what is infinitely bad.
    assert {row[1] for row in _table(page, "Worst layers")[1:3]} == {"\N{EN DASH}", "\N{MINUS SIGN}∞"}
    assert "Not drawn: 3 layers without a finite SQNR." in _Page(page).text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: "{", "report is not JSON"),
        (lambda r: "[" * 100_000, "report is not JSON"),
        (lambda r: json.dumps([r]), "not a JSON object with a version"),
        (lambda r: json.dumps(r | {"version": 2}), "has version 2, and this lowbit-core reads 1"),
        (lambda r: json.dumps({k: v for k, v in r.items() if k != "layers"}), "report lacks 'layers'"),
        (lambda r: json.dumps(r | {"color": 1}), "report has the unknown field 'color'"),
        (lambda r: json.dumps(r | {"title": 3}), "report.title is 3, not a string"),
        (lambda r: json.dumps(r | {"bytes_after": True}), "report.bytes_after is True, not a whole number"),
        (lambda r: json.dumps(r | {"bytes_after": 1.5}), "report.bytes_after is 1.5, not a whole number"),
        (lambda r: json.dumps(r | {"peak_memory": "1"}), "report.peak_memory is '1', not a whole number or null"),
        (lambda r: json.dumps(r | {"coverage": math.inf}), "report.coverage is inf, not a finite number"),
        (lambda r: json.dumps(r | {"coverage": [1]}), r"report.coverage is \[1\], not a finite number"),
        (lambda r: json.dumps(r | {"layers": {}}), "report.layers is {}, not a list"),
        (lambda r: json.dumps(r | {"environment": []}), r"report.environment is \[\], not an object"),
        (lambda r: json.dumps(r | {"environment": {"cpu": 1}}), "report.environment.cpu is 1, not a string"),
        (lambda r: json.dumps(r | {"calibration": {"a": []}}), "report.calibration.a is .*not a string or a whole"),
        (lambda r: json.dumps(r | {"blocks": [1]}), r"report.blocks\[0\] is 1, not an object"),
        (
            lambda r: json.dumps(r | {"layers": [r["layers"][0] | {"outliers": [[1, 2, 3]]}]}),
            r"report.layers\[0\].outliers\[0\] is \[1, 2, 3\], not a list of 2",
        ),
    ],
)
def test_damaged_json_is_refused_in_words(change, words):
    with pytest.raises(CheckpointError, match=words):
        Report.from_json(change(json.loads(_report().to_json())))


def test_hostile_names_add_no_element_and_no_attribute():
    def poison(value):
        match value:
            case str():
                return HOSTILE + value
            case list():
                return [poison(item) for item in value]
            case dict():
                return {key: poison(item) for key, item in value.items()}
        return value

    written = json.loads(_report().to_json())
    poisoned = poison(written) | {
        name: {HOSTILE + key: poison(value) for key, value in written[name].items()}
        for name in ("calibration", "environment")
    }
    harmless, hostile = _report().to_html(), Report.from_json(json.dumps(poisoned)).to_html()
    assert _Page(hostile).elements == _Page(harmless).elements
    assert "<script>alert" not in hostile
    assert "<img" not in hostile
    assert hostile.count("alert(1)") > 100
    for closing in ("</style>", "</script>"):
        assert hostile.count(closing) == 1
    hostile.encode()


def test_a_page_asks_for_nothing_and_runs_nothing_but_its_own():
    page = _report().to_html()
    assert not re.search(r"""\b(?:src|href|on\w+)\s*=|url\(|@import|https?:""", page)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', page)[1])
    assert re.fullmatch(r"default-src 'none'; style-src 'sha256-\S+'; script-src 'sha256-\S+'; base-uri 'none'", policy)
    assert " style=" not in page


def test_sections_with_nothing_to_show_are_left_out():
    every = [
        "What the terms mean",
        "Error by depth",
        "Error by layer",
        "Worst 10 layers",
        "Experts",
        "Outlier channels",
        "All layers",
        "Kernels",
        "Sizes",
        "What was kept, and why",
        "Calibration",
        "Environment",
        "Command",
    ]

    def headings(report):
        return [heading.replace("\N{NO-BREAK SPACE}", " ") for heading in _Page(report.to_html()).headings]

    assert headings(_report()) == every
    nearest = _nearest(_report())
    assert headings(nearest) == [every[0], every[3], *every[6:10], *every[11:]]
    bare = replace(nearest, layers=(), kept=(), environment={}, command="")
    assert headings(bare) == ["What the terms mean", "Sizes"]
    text = _Page(nearest.to_html()).text
    assert "utput SQNR" not in text
    assert "Hessian" not in text
    assert "Memory8 GiB allowed" in text


def test_terms_and_tiles_tell_the_numbers_of_this_run():
    text = _Page(_report().to_html()).text
    assert "has SQNR 32.0 dB: the error is 2.5 % of the signal" in text
    # The lowest is 32 - 14 / 8, and the last block's 40 / (1 + 3 / 9).
    assert "with SQNR 30.2 dB: the error is 3.1 % of the signal" in text
    assert "After block 3 it is 30.0 dB: the error is 3.2 % of the signal" in text
    assert "channel 27 of model.layers.3.mlp.q_proj.weight, peaks at 13.5 times" in text
    assert "8 of 32 experts saw too few tokens" in text
    assert "a thousand weights take 516 bytes" in text
    for tile in (
        "Size16 GiB → 5 GiB3.2 times smaller",
        "Bits per weight4.125",
        "Coverage98.7 %",
        "Time12 min 4 sfor 28 layers",
        "Peak memory6 GiB7 GiB planned, 8 GiB allowed",
    ):
        assert tile in text
    assert "More memory" not in text
    assert "More memory was used than was allowed." in _Page(_report(max_memory=5 << 30).to_html()).text


def test_a_gpus_memory_has_a_tile_of_its_own():
    assert "GPU" not in _Page(_report().to_html()).text
    gpu = _report(peak_gpu=2 << 30, planned_gpu=3 << 30, max_gpu=4 << 30)
    assert "Peak GPU memory2 GiB3 GiB planned, 4 GiB allowed" in _Page(gpu.to_html()).text
    assert Report.from_json(gpu.to_json()) == gpu
    text = _Page(replace(gpu, max_gpu=1 << 30).to_html()).text
    assert "More GPU memory was used than was allowed." in text
    assert "More memory" not in text


def test_the_worst_layers_are_the_worst():
    report = _report()
    heading, *rows = _table(report.to_html(), "Worst layers")
    assert heading[:3] == ["Layer", "Output SQNR, dB", "Error"]
    worst = sorted(report.layers, key=lambda layer: layer.output_sqnr)[:10]
    assert [row[0] for row in rows] == [layer.name for layer in worst]
    for row, layer in zip(rows, worst, strict=True):
        assert float(row[1]) == pytest.approx(layer.output_sqnr, abs=0.051)
        assert float(row[2].removesuffix(" %")) == pytest.approx(100 / 10 ** (layer.output_sqnr / 20), abs=0.051)
    nearest = _table(_nearest(report).to_html(), "Worst layers")
    assert nearest[0][1] == "Weight SQNR, dB"
    assert nearest[1][0] == worst[0].name


def test_tables_hold_every_layer_kernel_expert_and_kept_parameter():
    report = _report()
    page = report.to_html()
    heading, *rows = _table(page, "All layers")
    assert [row[0] for row in rows] == [layer.name for layer in report.layers]
    assert {len(row) for row in rows} == {len(heading)}
    assert dict(_table(page, "Kernels")[1:]) == {"none that runs it": "24", "reference.linear": "4"}
    assert _table(page, "What was kept")[1:] == [
        ["lm_head.weight", "1", "1 MiB", "kept by rule 'lm_head'"],
        ["model.layers.{0..3}.norm.weight", "4", "32 KiB", "no rule matches"],
    ]
    # 28 weights of 4096 x 14336 in 4.125 bits.
    assert ["INT4_G128", "28", "808.5 MiB", "4.9 %"] in _table(page, "Sizes")
    assert _table(page, "Calibration tokens by expert")[1][-3:] == ["0", "700", "0, 1"]
    assert page.count('class="bar marked"') == 8
    assert "Topped up" not in page
    topped = tuple(replace(experts, topped=(1, 2, 5)) for experts in report.experts)
    more = replace(report, experts=topped).to_html()
    assert _table(more, "Calibration tokens by expert")[1][-4:] == ["0", "700", "1, 2, 5", "0, 1"]
    assert "12 of 32 experts saw too few tokens for that, and were sent more" in _Page(more).text
    outliers = _table(page, "Outlier channels")
    assert [row[2] for row in outliers[1:]] == sorted((row[2] for row in outliers[1:]), key=float, reverse=True)
    # Names of as many letters were given the same channel.
    assert ["model.layers.3.mlp.q_proj.weight, k_proj, v_proj, o_proj", "27", "13.5"] in outliers


@pytest.mark.parametrize(("blocks", "opened"), [(8, True), (9, False)])
def test_a_long_table_of_layers_is_folded(blocks, opened):
    page = _report(blocks=blocks, experts=0).to_html()
    assert page.count("<details") == 1
    assert (page.count("<details open") == 1) is opened


def test_points_stand_where_the_axis_says():
    report = _report(blocks=9)
    plots = re.findall(r'<svg class="plot|<svg [^>]*class="plot.*?</svg>', report.to_html())
    assert len(plots) == 4
    expected = [report.blocks] * 2 + [report.layers] * 2
    for plot, told in zip(plots, expected, strict=True):
        ticks = [
            (float(y) - 4, float(value))
            for y, value in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)</text>', plot)
        ]
        (top, high), (bottom, low) = ticks[-1], ticks[0]
        assert high > low
        points = re.findall(r'transform="translate\(([\d.]+) ([\d.]+)\)"><title>(.*?):', plot)
        assert [name for _, _, name in points] == [item.name for item in told]
        assert all(float(a) < float(b) for (a, *_), (b, *_) in pairwise(points))
        for (_, y, _), item in zip(points, told, strict=True):
            value = high - (float(y) - top) / (bottom - top) * (high - low)
            sqnr = item.sqnr if isinstance(item, Block) else item.output_sqnr
            assert value == pytest.approx(sqnr, abs=0.15 * (high - low) / (bottom - top))


def test_kinds_beyond_eight_are_others():
    layers = tuple(_layer(0, f"proj{'abcdefghij'[i]}", 20 + i) for i in range(10))
    page = replace(_report(), layers=layers).to_html()
    legend = page.partition('class="legend"')[2].partition("</ul>")[0]
    names = re.findall(r"</svg>(\w+)<", legend)
    assert names == [f"proj{letter}" for letter in "abcdefgh"] + ["other"]


@pytest.mark.parametrize("sqnr", [-4000.0, -3.5, 0.0, 1e-9, 400.0, 1e300])
def test_extreme_values_are_drawn(sqnr):
    layer = replace(_layer(None, "lm_head", 30.0), name="lm_head.weight", output_sqnr=sqnr)
    block = Block(index=31, name="b", sqnr=sqnr, seconds=0.0)
    page = replace(_report(), layers=(layer,), blocks=(block,)).to_html()
    assert not re.search(r'"[^"]*\b(?:nan|inf)\b[^"]*"', page)


def test_the_environment_names_what_runs():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["threads"] == str(torch.get_num_threads())
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert found["lowbit-core"] == project["version"]
    assert found["cpu"]
    assert ("gpu" in found) is torch.cuda.is_available()


def _luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_both_palettes_have_contrast():
    css = files("lowbit").joinpath("data/report.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    )
    assert light.keys() == dark.keys()
    # WCAG 2.2: 4.5 for text, 3 for graphics.
    needed = dict.fromkeys(("text", "soft", "accent", "warning", "k1"), 4.5)
    for palette in (light, dark):
        for name in palette.keys() - {"page", "raised", "rule"}:
            for ground in ("page", "raised"):
                low, high = sorted((_luminance(palette[name]), _luminance(palette[ground])))
                assert (high + 0.05) / (low + 0.05) >= needed.get(name, 3), (name, ground)


def _corner(png):
    """Red, green and blue of the top left pixel, which no filter changes, for it has no neighbours."""
    data = png.read_bytes()
    raw, at = b"", 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        raw += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    return tuple(zlib.decompress(raw)[1:4])


@pytest.mark.parametrize(("scheme", "color"), [(0, (0x14, 0x17, 0x1B)), (1, (0xFF, 0xFF, 0xFF))])
def test_a_browser_shows_it_light_and_dark(chromium, tmp_path, scheme, color):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(_report().to_html(), encoding="utf-8")
    settings = f"--blink-settings=preferredColorScheme={scheme}"
    chromium(settings, "--window-size=1000,1400", f"--screenshot={picture}", page.as_uri())
    assert _corner(picture) == color


def test_a_browser_fits_it_into_a_phone_and_sorts_its_table(measured):
    long = {"title": "org/" + "a-very-long-name-" * 9, "command": "lowbit quantize " + "a" * 300}
    reports = [(_report(), 375), (_report(blocks=32, **long), 375), (_report(blocks=32), 1000), (_report(), 700)]
    column = "Output SQNR, dB"
    found = measured([(report.to_html(), width) for report, width in reports], press=[column, column])
    for (report, _), page in zip(reports, found, strict=True):
        assert page["plots"] == 2
        rising, falling = ([float(cell) for cell in cells] for cells in page["pressed"])
        values = sorted(round(layer.output_sqnr, 6) for layer in report.layers)
        assert rising == pytest.approx(values, abs=0.051)
        assert falling == pytest.approx(values[::-1], abs=0.051)
