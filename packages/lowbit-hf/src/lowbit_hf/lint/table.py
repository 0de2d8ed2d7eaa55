"""What a table of rules is made of: a runtime, and the schemes it takes or refuses, in the order it asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["linear", "experts"]
LINEAR: tuple[Part, ...] = ("linear",)
EXPERTS: tuple[Part, ...] = ("experts",)
BOTH: tuple[Part, ...] = ("linear", "experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Which QuantizationArgs a row takes; an empty tuple and None take any."""

    bits: tuple[int, ...]
    kind: Literal["int", "float"]
    strategies: tuple[str, ...] = ()
    groups: tuple[int | None, ...] = ()
    symmetric: bool | None = None
    dynamic: tuple[bool | str, ...] = ()
    scale_dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scheme of a runtime, or one it is known to refuse."""

    name: str
    formats: tuple[str, ...]
    weights: Needs
    # None: inputs must stay as they are; "any": the row does not look.
    inputs: Needs | Literal["any"] | None = None
    parts: tuple[Part, ...] = BOTH
    # CUDA compute capability, 75 for 7.5, that loads it; None: no CUDA device is needed.
    capability: int | None = None
    # Only this capability will do.
    exact: bool = False
    # Capability from which it runs as its name says; below, as `fallback` says.
    native: int | None = None
    fallback: str = ""
    kernel: str = ""
    # N and K on each GPU must be multiples of these, N summed over the projections that are fused.
    rows: int = 1
    columns: int = 1
    # dtypes the model may have; empty: any.
    dtypes: tuple[str, ...] = ()
    # Runs on CPUs alone.
    cpu_only: bool = False
    # Why it does not load although everything above fits, and what to do.
    refusal: str = ""
    fix: str = ""
    # Key of quantization_config that lifts the refusal where it is true.
    unless: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A foreign `quant_method` that a runtime loads: what its keys may be, and from which GPU on."""

    capability: int | None = None
    # Values a key of quantization_config may have; a key that is absent is not judged.
    values: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A program that loads checkpoints, as far as a lint must know it."""

    name: str
    version: str
    # What was read or run to fill the table.
    source: str
    rows: tuple[Row, ...]
    methods: Mapping[str, Method]
    # Whether it fuses projections, so that they need one scheme.
    fuses: bool = True
    # Whether targets that are class names mean its own classes: every matrix but embeddings and the head is a Linear.
    own_classes: bool = True
    # Whether every unquantized module must be in `ignore`, even one that no target covers.
    strict: bool = False
    # Whether a name in `ignore` also stands for modules whose name ends with it.
    suffixes: bool = False
    # Whether groups scattered by `weight_g_idx` load.
    scattered: bool = False
    # Whether a head that a target names is quantized: loads, "some" of its model classes do, or never.
    head: Literal["loads", "some"] = "loads"
    # Schemes an embedding may have, as names of rows.
    embeddings: tuple[str, ...] = ()
    # Whether `quantization_status` decides how it loads.
    reads_status: bool = False
    # Whether a group without `format` takes the config's; otherwise it is inferred.
    inherits_format: bool = True
    # Whether GPT-2's transposed Conv1D weights load: "packed" ones, or none.
    transposed: Literal["packed", "none"] = "packed"
    # kv_cache_scheme strategies that are used; others are refused, or ignored where `kv_lenient`.
    kv_strategies: tuple[str, ...] = ()
    kv_lenient: bool = False


ROW_PARALLEL = ("o_proj", "down_proj", "w2", "out_proj", "c_proj", "dense_4h_to_h", "fc2", "wo", "proj")
"""Last names of modules whose columns, not rows, are divided among GPUs.

Source: vLLM 0.32.0, uses of RowParallelLinear in vllm/model_executor/models.
"""

COLUMN_PARALLEL = ("q_proj", "q_b_proj", "gate_proj", "up_proj", "w1", "w3", "c_fc", "fc1")
"""Last names of modules whose rows are divided; those of k and v are repeated where heads are too few."""
