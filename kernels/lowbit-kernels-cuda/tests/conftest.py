"""Where there is no GPU, Triton interprets the kernels; it has to know before it is first imported."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def as_hardware_does():
    """Let the interpreter, which computes in numpy, divide by zero, overflow and meet NaN without a word."""
    with np.errstate(all="ignore"):
        yield
