"""The tools of lowbit.testing themselves."""

from __future__ import annotations

import pytest

from lowbit import backends
from lowbit.testing import Loopback, installed_backends


def test_backends_are_installed_inside_the_with_alone():
    before = set(backends.installed())
    with pytest.raises(ZeroDivisionError), installed_backends(Loopback("a"), Loopback("b", packs=True)):
        assert set(backends.installed()) == before | {"a", "b"}
        1 / 0  # noqa: B018
    assert set(backends.installed()) == before
