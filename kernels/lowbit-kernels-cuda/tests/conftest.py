"""What Triton's interpreter needs, which runs the kernels where there is no GPU."""

from __future__ import annotations

import inspect
from functools import cache

import numpy as np
import pytest
from triton.language.core import is_builtin
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def as_hardware_does():
    """Let the interpreter, which computes in numpy, divide by zero, overflow and meet NaN without a word."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True, scope="session")
def once():
    """Let the interpreter look once for what to replace in Triton's modules, not in every call of every function."""

    @cache
    def names(module):
        return [name for name, member in inspect.getmembers(module) if is_builtin(member)]

    def replace(module, builder, scope):
        for name in names(module):
            if is_builtin(member := getattr(module, name)):
                interpreter._patch_attr(module, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace)
        yield
