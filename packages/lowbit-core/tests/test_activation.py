"""Activations: specs that parse back, and the scalings a format allows."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from lowbit.activation import Activation
from lowbit.errors import FormatError
from lowbit.format import FORMATS, WHOLE, Format
from lowbit.numerics import ScaleMode, choose_scale
from lowbit.reference import quantize_input

SCALINGS = ("dynamic", "static", "local")
MODES = get_args(ScaleMode)
ONE_TWO_LEVEL = Format.parse("e2m1:*x*:e4m3fn:tensor")


def allowed(fmt: Format, scaling: str) -> bool:
    """Static: one stored scale is all there is; local: a stored tensor scale and block scales at run time."""
    if scaling == "static":
        return fmt.block == (WHOLE, WHOLE) and not fmt.tensor_scale
    return scaling == "dynamic" or fmt.tensor_scale


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("fmt", [*FORMATS.values(), ONE_TWO_LEVEL], ids=str)
def test_a_format_takes_the_scalings_it_can_store(fmt, scaling):
    if not allowed(fmt, scaling):
        match = "one scale a tensor" if scaling == "static" else "tensor scale"
        with pytest.raises(FormatError, match=match):
            Activation(fmt, scaling)
        return
    activation = Activation(fmt, scaling)
    assert str(activation) == f"{scaling}:{fmt}"
    parsed = Activation.parse(str(activation))
    assert parsed == activation
    assert hash(parsed) == hash(activation)


def test_names_and_the_default():
    assert Activation.parse("local:NVFP4") == Activation(FORMATS["NVFP4"], "local")
    assert Activation.parse("static:int8_tensor") == Activation(FORMATS["INT8_TENSOR"], "static")
    assert Activation(FORMATS["INT8_ROW"]).scaling == "dynamic"


def test_the_mode_of_scales_that_are_powers_of_two_is_part_of_the_spec():
    activation = Activation(FORMATS["MXFP8"], mode="rceil")
    assert str(activation) == f"dynamic:{FORMATS['MXFP8']}@rceil"
    assert Activation.parse("dynamic:MXFP8@rceil") == activation != Activation.parse("dynamic:MXFP8")
    assert Activation.parse("dynamic:MXFP8@even") == Activation.parse("dynamic:MXFP8")
    x = torch.tensor([[1.9 * 2.0**8, *[1.0] * 31]])
    # More than the largest code, 448, which by floor is what it is cut off to.
    scales = {mode: quantize_input(x, Activation(FORMATS["MXFP8"], mode=mode), None, None).scales for mode in MODES}
    found = {mode: float(each.scale.float()) for mode, each in scales.items()}
    assert found == {mode: float(choose_scale(x, FORMATS["MXFP8"], mode=mode).scale.float()) for mode in MODES}
    assert found["floor"] == 1 < found["rceil"]
    for spec in ("dynamic:INT8_ROW@rceil", "static:e4m3fn:*x*:e8m0@rceil", "dynamic:NVFP4@floor"):
        with pytest.raises(FormatError, match="not chosen among powers of two"):
            Activation.parse(spec)
    with pytest.raises(FormatError, match="scale mode 'up' is unknown"):
        Activation.parse("dynamic:MXFP8@up")


@pytest.mark.parametrize("spec", ["", "INT8_ROW", "int8:1x*:float32", "Dynamic:INT8_ROW", "dynamically:INT8_ROW"])
def test_a_spec_without_its_scaling_is_refused(spec):
    with pytest.raises(FormatError, match=r"'dynamic:', 'static:' or 'local:'"):
        Activation.parse(spec)


@pytest.mark.parametrize("spec", ["dynamic", "dynamic:", "static:INT9_ROW", "dynamic:dynamic:INT8_ROW"])
def test_a_spec_without_a_format_is_refused(spec):
    with pytest.raises(FormatError, match=r"format .*element:block:scale"):
        Activation.parse(spec)
