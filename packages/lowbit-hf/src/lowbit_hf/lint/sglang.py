"""What SGLang loads, as data: the schemes in the order in which it asks for them, and other tools' methods."""

from __future__ import annotations

from lowbit_hf.lint.table import BOTH, EXPERTS, LINEAR, Method, Needs, Row, Runtime

_GROUPED = ("group", "channel")
_WIDE = ("tensor", "channel")
_FP8_FORMATS = ("float-quantized", "naive-quantized")
_FP8_DYNAMIC = Needs(bits=(8,), kind="float", dynamic=(True,))
_FP8_STATIC = Needs(bits=(8,), kind="float", strategies=("tensor",), symmetric=True, dynamic=(False,))
_NVFP4 = Needs(bits=(4,), kind="float", strategies=("tensor_group",), groups=(16,), symmetric=True)
_MXFP4 = Needs(bits=(4,), kind="float", strategies=("group",), groups=(32,), symmetric=True)
_FP8_WIDE = Needs(bits=(8,), kind="float", strategies=_WIDE, symmetric=True)
_INT8_WIDE = Needs(bits=(8,), kind="int", strategies=_WIDE, symmetric=True)
_INT4 = Needs(bits=(4,), kind="int", symmetric=True)
_ANY_INT = Needs(bits=(2, 3, 4, 5, 6, 7, 8), kind="int")

_ROWS = (
    Row(
        name="W4A16 / W8A16",
        formats=("pack-quantized",),
        weights=Needs(bits=(4, 8), kind="int", strategies=_GROUPED, groups=(None, -1, 32, 64, 128)),
        capability=80,
        kernel="Marlin",
    ),
    Row(name="NVFP4A16", formats=("nvfp4-pack-quantized",), weights=_NVFP4, capability=80, kernel="Marlin fp4"),
    Row(
        name="NVFP4",
        formats=("nvfp4-pack-quantized",),
        weights=_NVFP4,
        inputs=_NVFP4,
        capability=80,
        native=100,
        fallback="inputs stay 16-bit (Marlin), which is slower than on Blackwell",
        kernel="FlashInfer fp4",
    ),
    Row(
        name="FP8",
        formats=_FP8_FORMATS,
        weights=_FP8_WIDE,
        inputs=_FP8_STATIC,
        capability=80,
        native=89,
        fallback="inputs stay 16-bit (Marlin), which is slower at large batches",
        kernel="CUTLASS fp8",
    ),
    Row(
        name="FP8_DYNAMIC",
        formats=_FP8_FORMATS,
        weights=_FP8_WIDE,
        inputs=_FP8_DYNAMIC,
        capability=80,
        native=89,
        fallback="inputs stay 16-bit (Marlin), which is slower at large batches",
        kernel="CUTLASS fp8",
    ),
    Row(
        name="FP8_BLOCK",
        formats=_FP8_FORMATS,
        weights=Needs(bits=(8,), kind="float", strategies=("block",), symmetric=True),
        inputs=_FP8_DYNAMIC,
        capability=89,
        columns=128,
        kernel="DeepGEMM, CUTLASS or Triton block fp8",
    ),
    Row(name="FP8 W8A16", formats=_FP8_FORMATS, weights=_FP8_WIDE, parts=LINEAR, capability=80, kernel="Marlin fp8"),
    Row(
        name="W8A8_STATIC",
        formats=("int-quantized",),
        weights=_INT8_WIDE,
        inputs=Needs(bits=(8,), kind="int", strategies=("tensor",), dynamic=(False,)),
        parts=LINEAR,
        capability=80,
        kernel="CUTLASS int8",
    ),
    Row(
        name="W8A8",
        formats=("int-quantized",),
        weights=_INT8_WIDE,
        inputs=Needs(bits=(8,), kind="int", strategies=("token",), dynamic=(True,)),
        parts=LINEAR,
        capability=80,
        kernel="CUTLASS int8",
    ),
    Row(
        name="W8A8",
        formats=("int-quantized",),
        weights=_INT8_WIDE,
        inputs="any",
        parts=EXPERTS,
        refusal="SGLang runs experts in int8 on NPUs only",
        fix="quantize the experts to FP8_DYNAMIC or W4A16",
    ),
    Row(
        name="W4AFP8",
        formats=("pack-quantized",),
        weights=_INT4,
        inputs=Needs(bits=(8,), kind="float", dynamic=(True,)),
        parts=EXPERTS,
        capability=90,
        kernel="CUTLASS w4a8 grouped",
    ),
    Row(
        name="W4AFP8",
        formats=("pack-quantized",),
        weights=_INT4,
        inputs=Needs(bits=(8,), kind="float", dynamic=(True,)),
        parts=LINEAR,
        refusal="SGLang has 4-bit weights with fp8 inputs for experts only",
        fix="quantize linear layers to FP8_DYNAMIC or W4A16",
    ),
    Row(
        name="MXFP4",
        formats=("mxfp4-pack-quantized",),
        weights=_MXFP4,
        inputs="any",
        parts=EXPERTS,
        capability=80,
        kernel="Triton or FlashInfer mxfp4",
    ),
    Row(
        name="MXFP4",
        formats=("mxfp4-pack-quantized",),
        weights=_MXFP4,
        inputs="any",
        parts=LINEAR,
        refusal="SGLang has MXFP4 of compressed-tensors for experts only",
        fix="quantize linear layers to NVFP4A16, W4A16 or FP8_DYNAMIC",
    ),
    Row(
        name="MXFP8",
        formats=("mxfp8-quantized",),
        weights=Needs(bits=(8,), kind="float", strategies=("group",)),
        inputs="any",
        parts=BOTH,
        refusal="SGLang does not know the format 'mxfp8-quantized'",
        fix="quantize to FP8_DYNAMIC or FP8_BLOCK",
    ),
    Row(
        name="MXFP6",
        formats=("mxfp6-pack-quantized",),
        weights=Needs(bits=(6,), kind="float"),
        inputs="any",
        parts=BOTH,
        refusal="SGLang has no scheme for 6-bit floats",
        fix="quantize to FP8_DYNAMIC or NVFP4A16",
    ),
    Row(
        name="WNA8",
        formats=("pack-quantized", "int-quantized"),
        weights=Needs(bits=(2, 3, 4, 5, 6, 7), kind="int"),
        inputs=Needs(bits=(4, 8), kind="int"),
        parts=BOTH,
        refusal="SGLang has integer inputs for 8-bit weights only",
        fix="quantize to W4A16, or to W8A8",
    ),
)

SGLANG = Runtime(
    name="sglang",
    version="0.5.23",
    source=(
        "SGLang 0.5.23, read: sglang/srt/layers/quantization/{__init__.py,compressed_tensors/**,gptq/**}; its methods "
        "for awq, fp8, modelopt and mxfp4 by name only"
    ),
    rows=_ROWS,
    strict=True,
    suffixes=True,
    scattered=True,
    kv_strategies=("tensor",),
    kv_lenient=True,
    methods={
        "gptq": Method(capability=80, values={"bits": (4, 8), "sym": (True,)}),
        "awq": Method(capability=75, values={"bits": (4,)}),
        "fp8": Method(capability=80, values={"activation_scheme": ("static", "dynamic")}),
        "modelopt": Method(capability=80),
        "mxfp4": Method(capability=80),
        "quark": Method(),
    },
)
