"""What transformers loads through compressed-tensors, as data. It decompresses, so GPUs make no difference."""

from __future__ import annotations

from lowbit_hf.lint.table import BOTH, EXPERTS, LINEAR, Method, Needs, Row, Runtime

_INTS = (2, 3, 4, 5, 6, 7, 8)
_DENSE = "load it with CompressedTensorsConfig(dequantize=True)"
_STACKED = "load it with lowbit_hf.load, or keep the experts unquantized"
_CANNOT = "transformers cannot put the experts of this scheme together"
_NVFP4 = Needs(bits=(4,), kind="float", strategies=("tensor_group",), groups=(16,), symmetric=True)
_FP4 = Needs(bits=(4,), kind="float", strategies=("group",), groups=(32,), symmetric=True)
_FP6 = Needs(bits=(6,), kind="float", strategies=("group",), groups=(32,), symmetric=True)
_FP8_GROUP = Needs(bits=(8,), kind="float", strategies=("group",), groups=(32,), symmetric=True)
_FP8_BLOCK = Needs(bits=(8,), kind="float", strategies=("block",))
_FP8_WIDE = Needs(bits=(8,), kind="float", strategies=("tensor", "channel"))
_INT = Needs(bits=_INTS, kind="int")
_ASYMMETRIC = Needs(bits=_INTS, kind="int", symmetric=False)
_FP8_FORMATS = ("float-quantized", "naive-quantized")
_PACKED = ("pack-quantized",)
_MXFP8_FORMATS = ("mxfp8-quantized",)
_MXFP4_FORMATS = ("mxfp4-pack-quantized",)
_NVFP4_FORMATS = ("nvfp4-pack-quantized",)

# Refusals first: what follows takes whatever compressed-tensors can decompress.
_ROWS = (
    Row(
        name="W4A16_ASYM",
        formats=_PACKED,
        weights=_ASYMMETRIC,
        inputs="any",
        parts=LINEAR,
        refusal="transformers 5.23 expects unpacked zero points when it keeps weights compressed",
        fix=_DENSE,
        unless="dequantize",
    ),
    Row(
        name="W4A16_ASYM",
        formats=_PACKED,
        weights=_ASYMMETRIC,
        inputs="any",
        parts=EXPERTS,
        refusal=_CANNOT,
        fix=_STACKED,
    ),
    Row(
        name="NVFP4",
        formats=_NVFP4_FORMATS,
        weights=_NVFP4,
        inputs="any",
        parts=EXPERTS,
        refusal="transformers 5.23 drops the experts' global scales, which gives wrong values without a word",
        fix=_STACKED,
    ),
    Row(
        name="W8A8",
        formats=("int-quantized",),
        weights=Needs(bits=(8,), kind="int"),
        inputs="any",
        parts=EXPERTS,
        refusal=_CANNOT,
        fix=_STACKED,
    ),
    Row(
        name="FP8_BLOCK",
        formats=_FP8_FORMATS,
        weights=_FP8_BLOCK,
        inputs="any",
        parts=EXPERTS,
        refusal=_CANNOT,
        fix=_STACKED,
    ),
    Row(
        name="MXFP8",
        formats=_MXFP8_FORMATS,
        weights=_FP8_GROUP,
        inputs="any",
        parts=EXPERTS,
        refusal=_CANNOT,
        fix=_STACKED,
    ),
    Row(name="packed integers", formats=_PACKED, weights=_INT, inputs="any", parts=BOTH, kernel="decompressed"),
    Row(name="integers", formats=("int-quantized",), weights=_INT, inputs="any", kernel="decompressed"),
    Row(name="FP8", formats=_FP8_FORMATS, weights=_FP8_WIDE, inputs="any", kernel="decompressed"),
    Row(name="FP8_BLOCK", formats=_FP8_FORMATS, weights=_FP8_BLOCK, inputs="any", kernel="decompressed"),
    Row(name="MXFP8", formats=_MXFP8_FORMATS, weights=_FP8_GROUP, inputs="any", kernel="decompressed"),
    Row(name="MXFP6", formats=("mxfp6-pack-quantized",), weights=_FP6, inputs="any", kernel="decompressed"),
    Row(name="MXFP4", formats=_MXFP4_FORMATS, weights=_FP4, inputs="any", kernel="decompressed"),
    Row(name="NVFP4", formats=_NVFP4_FORMATS, weights=_NVFP4, inputs="any", kernel="decompressed"),
)

TRANSFORMERS = Runtime(
    name="transformers",
    version="5.23",
    source=(
        "transformers 5.23.0 with compressed-tensors 0.20.0, run (docs/checkpoints.md, Loading) and read: "
        "transformers/quantizers, compressed_tensors/{compressors,quantization}"
    ),
    rows=_ROWS,
    fuses=False,
    own_classes=False,
    embeddings=("packed integers", "integers"),
    reads_status=True,
    inherits_format=False,
    transposed="none",
    methods={
        "gptq": Method(note="needs the package gptqmodel"),
        "awq": Method(values={"bits": (4,)}, note="needs the package gptqmodel"),
        "fp8": Method(note="needs sm89 and up to keep fp8"),
        "mxfp8": Method(),
        "mxfp4": Method(note="dequantizes where it finds no kernel"),
        "torchao": Method(note="needs the package torchao"),
        "bitsandbytes": Method(note="needs the package bitsandbytes"),
        "quark": Method(note="needs the package quark"),
        "fbgemm_fp8": Method(),
        "hqq": Method(),
    },
)
