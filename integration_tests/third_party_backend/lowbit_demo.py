"""The lowbit backend `demo`: int8 weights with one scale a row."""

import torch

from lowbit.backends import Kernel

# Codes are laid out as fractions of this, exactly, so that their products stay in the range of float16.
WHOLE = 128


def refuses(call):
    """None where the call is taken, otherwise the reason."""
    if str(call.format) != "int8:1x*:float32":
        return f"needs int8:1x*:float32 weights, not {call.format}"
    if call.activation is not None:
        return "needs inputs that stay as they are"
    return None


def pack(weight):
    """Every inner tensor, in order; the codes in the dtype of the input."""
    inner = weight.inner_tensors()
    return (inner.pop("qdata").to(weight.dtype) / WHOLE, *inner.values())


def unpack(parts, description):
    """The inner tensors again, bit for bit."""
    inner = dict(zip(description.names, parts, strict=True))
    return {**inner, "qdata": (inner["qdata"] * WHOLE).to(torch.int8)}


def run(x, parts, description, bias):
    """`(x * pre_scale) @ codes.T * scale + bias`."""
    inner = dict(zip(description.names, parts, strict=True))
    if "pre_scale" in inner:
        x = x * inner["pre_scale"].to(x.dtype)
    # Under autocast, x has another dtype than the weight reads as.
    product = torch.nn.functional.linear(x, inner["qdata"].to(x.dtype))
    out = product * (inner["scale"].squeeze(-1) * WHOLE)
    return (out if bias is None else out + bias).to(x.dtype)


class Demo:
    name = "demo"

    def probe(self):
        """None if this machine can run the backend, otherwise the reason it cannot."""

    def kernels(self):
        return (Kernel("demo.linear_int8_row", "linear", "any", 10, run, refuses, pack, unpack),)


backend = Demo()
