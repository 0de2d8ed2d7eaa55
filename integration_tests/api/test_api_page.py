"""docs/api.md has every public name and how it is called: none goes or changes without a word."""

from __future__ import annotations

import re

import api_page
import pytest

ROW = re.compile(r"^\| `([\w.]+)(.*?)` \| ([\w ]+) \|", re.MULTILINE)


def names(text):
    """Every name of a page, below its module, and how it is called."""
    found = {}
    for part in text.split("\n### ")[1:]:
        found |= {(part.partition("\n")[0], name): f"{name}{how}" for name, how, _ in ROW.findall(part)}
    return found


@pytest.fixture(scope="module")
def pages():
    committed = api_page.PAGE.read_text(encoding="utf-8")
    return committed, api_page.page(committed)


def test_no_public_name_goes_or_changes_unsaid(pages):
    before, now = map(names, pages)
    broken = {key: now.get(key, "gone") for key in before if now.get(key) != before[key]}
    assert broken == {}, (
        "public names went, or are called otherwise than docs/api.md says: give them back, or keep the old way beside the "
        "new one, as docs/versioning.md asks; if it is meant, run python integration_tests/api/api_page.py and say so in "
        "the changelog"
    )


def test_the_page_has_what_there_is(pages):
    committed, now = pages
    assert committed == now, "run python integration_tests/api/api_page.py"
