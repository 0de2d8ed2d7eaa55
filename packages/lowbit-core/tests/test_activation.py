"""Activations: specs that parse back, and the scalings a format allows."""

from __future__ import annotations

import pytest

from lowbit.activation import Activation
from lowbit.errors import FormatError
from lowbit.format import FORMATS, WHOLE, Format

SCALINGS = ("dynamic", "static", "local")
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


@pytest.mark.parametrize("spec", ["", "INT8_ROW", "int8:1x*:float32", "Dynamic:INT8_ROW", "dynamically:INT8_ROW"])
def test_a_spec_without_its_scaling_is_refused(spec):
    with pytest.raises(FormatError, match=r"'dynamic:', 'static:' or 'local:'"):
        Activation.parse(spec)


@pytest.mark.parametrize("spec", ["dynamic", "dynamic:", "static:INT9_ROW", "dynamic:dynamic:INT8_ROW"])
def test_a_spec_without_a_format_is_refused(spec):
    with pytest.raises(FormatError, match=r"format .*element:block:scale"):
        Activation.parse(spec)
