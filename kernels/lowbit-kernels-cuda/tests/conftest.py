"""What Triton's interpreter needs, which runs the kernels where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def as_hardware_does():
    """Let the interpreter, which computes in numpy, divide by zero, overflow and meet NaN without a word."""
    with np.errstate(all="ignore"):
        yield
