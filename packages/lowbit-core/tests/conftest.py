"""Tests of operators run once more through a backend that hands every call on to the reference.

Backends of other members, which are installed beside this one here, are not found: each has tests of its own.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from lowbit import bind
from lowbit.testing import Loopback, installed_backends, only_backends

THROUGH = ["reference", "loopback", "packed loopback"]


# A fixture of a session would outlast these tests.
@pytest.fixture(autouse=True, scope="module")
def alone():
    with only_backends("reference"):
        yield


@pytest.fixture(params=THROUGH[:2])
def through(request):
    """`through(module)`: a module as it runs on the backend of this run, which is bound only if that packs weights.

    A test that asks for this must call an operator, and one parametrized with the packed loopback a bound module.
    """
    if request.param == "reference":
        yield lambda module: module
        return
    packs = request.param == "packed loopback"
    loopback = Loopback(packs=packs)

    def bound(module):
        assert all(row.kernel.startswith("loopback") and row.packed for row in bind(module).rows)
        return module

    with installed_backends(loopback):
        yield bound if packs else lambda module: module
    assert loopback.calls["linear"] + loopback.calls["embedding"] if packs else loopback.calls.total()


@pytest.fixture
def chromium(tmp_path):
    """`chromium(*arguments)`: what a headless browser prints."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("needs Chromium: apt-get install chromium")
    fixed = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars"
    )

    def run(*arguments):
        command = [found[0], *fixed.split(), f"--user-data-dir={tmp_path / 'profile'}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return run


# A window may not be as narrow as a phone, so pages are measured in frames.
_MEASURE = """
addEventListener("load", () => {
  const touch = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const measured = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const plots = [...page.querySelectorAll("svg.plot")].filter((svg) => svg.getClientRects().length);
    const texts = plots.map((svg) => [...svg.querySelectorAll("text")]);
    const size = (text) => parseFloat(getComputedStyle(text).fontSize) *
      text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width;
    const box = (text) => text.getBoundingClientRect();
    const press = (label) => {
      const head = [...page.querySelectorAll("table.sortable th button")].find((b) => b.textContent === label);
      head.click();
      const column = head.parentElement.cellIndex;
      return [...page.querySelectorAll("table.sortable tbody tr")].map((row) => row.cells[column].textContent);
    };
    return {
      widths: [root.clientWidth, root.scrollWidth],
      plots: plots.length,
      smallest: Math.min(...texts.flat().map(size)),
      touching: texts.flatMap((all) => all.flatMap((a, i) => all.slice(i + 1)
        .filter((b) => touch(box(a), box(b))).map((b) => [a.textContent, b.textContent]))),
      outside: texts.flat().filter((text) => {
        const around = box(text.ownerSVGElement);
        return box(text).right > around.right + 1 || box(text).left < around.left - 1;
      }).map((text) => text.textContent),
      tables: [...page.querySelectorAll(".scroll")].filter((box) => box.clientWidth > root.clientWidth).length,
      pressed: PRESSED.map(press),
    };
  });
  document.body.dataset.measured = JSON.stringify(measured);
});
"""


@pytest.fixture
def measured(chromium, tmp_path):
    """`measured([(page, width), ...], press=labels)`: what a browser makes of pages, which must fit their widths.

    Of each the number of plots, and by `pressed` the column of each label of the sortable table after that was pressed.
    """

    def measure(pages, press=()):
        # What is folded is open before anything is laid out: opened by a script, it would be measured in the same breath.
        opened = [(html.escape(page.replace("<details>", "<details open>")), width) for page, width in pages]
        frames = [
            f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>'
            for page, width in opened
        ]
        script = _MEASURE.replace("PRESSED", json.dumps(press))
        wrapper = tmp_path / "wrapper.html"
        wrapper.write_text(f"<!doctype html><body>{''.join(frames)}<script>{script}</script>", encoding="utf-8")
        dom = chromium("--window-size=1200,1000", "--dump-dom", wrapper.as_uri())
        found = json.loads(html.unescape(re.search(r'data-measured="(.*?)"', dom)[1]))
        for i, ((_, width), page) in enumerate(zip(pages, found, strict=True)):
            assert (i, page["widths"]) == (i, [width, width])
            assert page["smallest"] >= 11
            assert (page["touching"], page["outside"], page["tables"]) == ([], [], 0)
        return found

    return measure
