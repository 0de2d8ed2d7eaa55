"""What vLLM loads, as data: the schemes in the order in which it asks for them, and other tools' methods."""

from __future__ import annotations

from lowbit_hf.lint.table import BOTH, EXPERTS, LINEAR, Method, Needs, Row, Runtime

_GROUPED = ("group", "channel")
_WIDE = ("tensor", "channel")
_FP8_FORMATS = ("float-quantized", "naive-quantized")
_FP8_TOKEN = Needs(bits=(8,), kind="float", strategies=("token",), symmetric=True, dynamic=(True,))
_FP8_DYNAMIC = Needs(bits=(8,), kind="float", dynamic=(True,))
_FP8_STATIC = Needs(bits=(8,), kind="float", strategies=("tensor",), symmetric=True, dynamic=(False,))
_INT8_TOKEN = Needs(bits=(8,), kind="int", strategies=("token",), dynamic=(True,))
_INT8_STATIC = Needs(bits=(8,), kind="int", strategies=("tensor",), dynamic=(False,))
_NVFP4 = Needs(bits=(4,), kind="float", strategies=("tensor_group",), groups=(16,), symmetric=True)
_MXFP4 = Needs(bits=(4,), kind="float", strategies=("group",), groups=(32,), symmetric=True)
_MXFP6 = Needs(bits=(6,), kind="float")
_FP8_WIDE = Needs(bits=(8,), kind="float", strategies=_WIDE, symmetric=True)
_FP8_BLOCK = Needs(bits=(8,), kind="float", strategies=("block",), symmetric=True)
_INT8_WIDE = Needs(bits=(8,), kind="int", strategies=_WIDE, symmetric=True)
_INT8_ROW = Needs(bits=(8,), kind="int", strategies=("channel",), symmetric=True)
_MXFP8 = Needs(bits=(8,), kind="float", strategies=("group",), groups=(32,), symmetric=True, scale_dtype="torch.uint8")
_INT4_G128 = Needs(bits=(4,), kind="int", strategies=("group",), groups=(128,), symmetric=True)
_MARLIN_GROUPS = (None, -1, 32, 64, 128)
_W8A16_INSTEAD = "inputs stay 16-bit (Marlin), which is slower at large batches"

_ROWS = (
    Row(
        name="NVFP4",
        formats=("nvfp4-pack-quantized",),
        weights=_NVFP4,
        inputs=_NVFP4,
        capability=75,
        native=100,
        fallback="inputs stay 16-bit (Marlin) or fp4 is emulated, which is slower than on Blackwell",
        kernel="FlashInfer or CUTLASS fp4",
    ),
    Row(name="NVFP4A16", formats=("nvfp4-pack-quantized",), weights=_NVFP4, capability=75, kernel="Marlin fp4"),
    Row(
        name="MXFP4XFP8",
        formats=("mxfp4-pack-quantized",),
        weights=_MXFP4,
        inputs=Needs(bits=(8,), kind="float", strategies=("token", "group"), symmetric=True, dynamic=(True,)),
        capability=80,
        kernel="FlashInfer mxfp4 x fp8, or Marlin",
    ),
    Row(
        name="MXFP4",
        formats=("mxfp4-pack-quantized",),
        weights=_MXFP4,
        inputs="any",
        capability=80,
        kernel="FlashInfer mxfp4 on Blackwell, else Marlin",
    ),
    Row(
        name="MXFP8",
        formats=("mxfp8-quantized",),
        weights=_MXFP8,
        inputs="any",
        capability=75,
        kernel="FlashInfer mxfp8 on Blackwell, else Marlin",
    ),
    Row(
        name="W4AFP8",
        formats=("pack-quantized",),
        weights=_INT4_G128,
        inputs=_FP8_TOKEN,
        parts=LINEAR,
        capability=90,
        exact=True,
        rows=128,
        columns=128,
        dtypes=("bfloat16",),
        kernel="CUTLASS w4a8",
    ),
    Row(
        name="W4AFP8",
        formats=("pack-quantized",),
        weights=_INT4_G128,
        inputs=_FP8_TOKEN,
        parts=EXPERTS,
        capability=90,
        exact=True,
        # Of hidden and intermediate size alike.
        columns=256,
        dtypes=("bfloat16",),
        kernel="CUTLASS w4a8 grouped",
    ),
    Row(
        name="WNA8",
        formats=("pack-quantized",),
        weights=Needs(bits=(2, 3, 4, 5, 6, 7, 8), kind="int", strategies=_GROUPED),
        inputs=Needs(bits=(8,), kind="int", strategies=("token", "group"), symmetric=True, dynamic=(True,)),
        parts=LINEAR,
        capability=75,
        kernel="Humming, which is a package of its own",
    ),
    Row(
        name="WNA4",
        formats=("pack-quantized",),
        weights=Needs(bits=(2, 3, 4, 5, 6, 7, 8), kind="int", strategies=_GROUPED),
        inputs=Needs(bits=(4,), kind="int", strategies=("token", "group"), symmetric=True, dynamic=(True,)),
        parts=LINEAR,
        capability=75,
        kernel="Humming, which is a package of its own",
    ),
    Row(
        name="W4A16 / W8A16",
        formats=("pack-quantized",),
        weights=Needs(bits=(4, 8), kind="int", strategies=_GROUPED, groups=_MARLIN_GROUPS),
        parts=LINEAR,
        capability=75,
        kernel="Machete on sm90, else Marlin",
    ),
    Row(
        name="W4A16 / W8A16",
        formats=("pack-quantized",),
        weights=Needs(bits=(4, 8), kind="int", strategies=_GROUPED, groups=_MARLIN_GROUPS),
        parts=EXPERTS,
        capability=75,
        kernel="Marlin, grouped",
    ),
    Row(
        name="WNA16",
        formats=("pack-quantized",),
        weights=Needs(bits=(2, 3, 4, 5, 6, 7, 8), kind="int", strategies=_GROUPED),
        capability=75,
        kernel="Humming, which is a package of its own; Conch or Exllama for some",
    ),
    Row(
        name="FP8",
        formats=_FP8_FORMATS,
        weights=_FP8_WIDE,
        inputs=_FP8_STATIC,
        capability=75,
        native=89,
        fallback=_W8A16_INSTEAD,
        kernel="CUTLASS or FlashInfer fp8",
    ),
    Row(
        name="FP8_DYNAMIC",
        formats=_FP8_FORMATS,
        weights=_FP8_WIDE,
        inputs=_FP8_DYNAMIC,
        capability=75,
        native=89,
        fallback=_W8A16_INSTEAD,
        kernel="CUTLASS or FlashInfer fp8",
    ),
    Row(
        name="FP8_BLOCK",
        formats=_FP8_FORMATS,
        weights=_FP8_BLOCK,
        inputs=_FP8_DYNAMIC,
        capability=75,
        native=89,
        fallback=_W8A16_INSTEAD,
        columns=128,
        kernel="DeepGEMM, CUTLASS or Triton block fp8",
    ),
    Row(
        name="FP8 W8A16",
        formats=_FP8_FORMATS,
        weights=Needs(bits=(8,), kind="float", strategies=(*_WIDE, "block"), symmetric=True),
        parts=LINEAR,
        capability=75,
        kernel="Marlin fp8",
    ),
    Row(
        name="W8A8_STATIC",
        formats=("int-quantized",),
        weights=_INT8_WIDE,
        inputs=_INT8_STATIC,
        parts=LINEAR,
        capability=75,
        kernel="CUTLASS int8",
    ),
    Row(
        name="W8A8",
        formats=("int-quantized",),
        weights=_INT8_WIDE,
        inputs=_INT8_TOKEN,
        parts=LINEAR,
        capability=75,
        kernel="CUTLASS int8",
    ),
    Row(
        name="W8A8",
        formats=("int-quantized",),
        weights=_INT8_ROW,
        inputs=_INT8_TOKEN,
        parts=EXPERTS,
        capability=75,
        kernel="Triton int8 grouped",
    ),
    Row(
        name="W4A8 on CPUs",
        formats=("int-quantized",),
        weights=Needs(bits=(4,), kind="int", strategies=_GROUPED, symmetric=True),
        inputs=_INT8_TOKEN,
        cpu_only=True,
        kernel="4-bit kernels of Arm CPUs",
    ),
    Row(
        name="MXFP6",
        formats=("mxfp6-pack-quantized",),
        weights=_MXFP6,
        inputs="any",
        parts=BOTH,
        refusal="vLLM has no scheme for 6-bit floats in compressed-tensors",
        fix="quantize to MXFP8 or MXFP4 instead",
    ),
)

VLLM = Runtime(
    name="vllm",
    version="0.33",
    source=(
        "vLLM 0.32.0, read: vllm/model_executor/{layers/quantization/{compressed_tensors/**,auto_gptq,auto_awq,fp8,"
        "mxfp4,modelopt}.py,kernels/linear,models}; 0.33.0 asks for schemes in the same order, of the same GPUs"
    ),
    rows=_ROWS,
    head="some",
    embeddings=("W4A16 / W8A16", "WNA16"),
    kv_strategies=("tensor", "attn_head"),
    methods={
        "gptq": Method(capability=75, values={"bits": (4, 8), "sym": (True,), "group_size": _MARLIN_GROUPS}),
        "awq": Method(capability=75, values={"bits": (4,), "group_size": _MARLIN_GROUPS}),
        "fp8": Method(capability=75, values={"activation_scheme": ("static", "dynamic")}),
        "modelopt": Method(
            capability=75,
            values={
                "quant_algo": (
                    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8"),
                    "MIXED_PRECISION",
                )
            },
        ),
        "mxfp4": Method(capability=80),
        "torchao": Method(capability=75),
        "quark": Method(capability=75),
        "fbgemm_fp8": Method(capability=75),
    },
)
