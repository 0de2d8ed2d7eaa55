"""The layouts that checkpoints of quantized weights come in, and those that they can be written in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lowbit.errors import CheckpointError
from lowbit.header import quote
from lowbit_hf.layouts.awq import Awq, AwqWriter
from lowbit_hf.layouts.compressed_tensors import CompressedTensors, CompressedTensorsWriter
from lowbit_hf.layouts.fp8 import Fp8, Fp8Writer
from lowbit_hf.layouts.gguf import Gguf
from lowbit_hf.layouts.gptq import Gptq, GptqWriter
from lowbit_hf.layouts.layout import Layout, Outline, Writer
from lowbit_hf.layouts.lowbit import Lowbit, LowbitWriter
from lowbit_hf.layouts.modelopt import ModelOpt, ModelOptWriter
from lowbit_hf.layouts.mxfp4 import Mxfp4, Mxfp4Writer
from lowbit_hf.skeleton import Skeleton, read_json

__all__ = ["LAYOUTS", "WRITERS", "Layout", "Outline", "Writer", "layout_of"]

LAYOUTS: dict[str, type[Layout]] = {
    layout.method: layout for layout in (CompressedTensors, Gptq, Awq, ModelOpt, Fp8, Mxfp4, Gguf, Lowbit)
}
"""By `quant_method`."""

WRITERS: dict[str, Writer] = {
    writer.name: writer
    for writer in (
        *(CompressedTensorsWriter(), ModelOptWriter(), GptqWriter(1), GptqWriter(2)),
        *(AwqWriter(), Fp8Writer(), Mxfp4Writer(), LowbitWriter()),
    )
}
"""By the name that `lowbit export --as` takes."""

_MODELOPT_FILE = "hf_quant_config.json"


def layout_of(folder: Path, config: Mapping[str, Any], skeleton: Skeleton | None) -> Layout | None:
    """How a checkpoint with this `config.json` keeps its quantized weights; None: it has none.

    Raises:
        CheckpointError: it is quantized by a method that lowbit does not read, or its config is malformed.
    """
    quantization: Any = config.get("quantization_config", config.get("compression_config"))
    if quantization is None and (folder / _MODELOPT_FILE).is_file():
        quantization = {"quant_method": "modelopt", **read_json(folder / _MODELOPT_FILE)}
    if quantization is None:
        return None
    method = quantization
    if isinstance(quantization, dict):
        # Configs of old named no method; only compressed-tensors ever had groups.
        method = cast("dict[str, Any]", quantization).get("quant_method", "compressed-tensors")
    if not isinstance(quantization, dict) or not isinstance(method, str) or method not in LAYOUTS:
        msg = f"this checkpoint is quantized by {quote(method)}; lowbit reads {', '.join(LAYOUTS)}"
        raise CheckpointError(msg)
    return LAYOUTS[method](cast("dict[str, Any]", quantization), skeleton)
