"""The rule that experts are stored one by one, whatever a model does with them in memory; and who cannot read that."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lowbit_hf.lint.finding import Finding, name_all
from lowbit_hf.lint.subject import Subject

# Models whose loader takes experts as stacks alone, whatever they are quantized by.
# Source: vLLM, vllm/model_executor/models/gpt_oss.py; SGLang, python/sglang/srt/models/gpt_oss.py.
_STACKS_ALONE = {"vllm": "GptOssForCausalLM", "sglang": "GptOssForCausalLM"}

_STACK = re.compile(r".+\.experts\.(?!\d)\w+?[._](weight_)?(packed|scale|zero_point|global_scale)")


def check_stacked(subject: Subject) -> Iterator[Finding]:
    """Quantized experts in three dimensions, for which compressed-tensors has no keys; single ones where none looks."""
    names = [name for name in subject.checkpoint.entries if _STACK.fullmatch(name)]
    if names:
        yield Finding(
            severity="error",
            key=name_all(names),
            what="experts are stored as one stack",
            fix="store each by itself, as experts.0.gate_proj.weight_packed and so on",
            runtimes=subject.everywhere,
        )
    skeleton = subject.skeleton
    alone = [] if skeleton is None else [name for name in subject.modules if skeleton.stack_of(f"{name}.weight")]
    if skeleton is None or not alone:
        return
    architecture = type(skeleton.model).__name__
    # Where we join them, transformers has no conversion that does.
    lost = [r.name for r in subject.runtimes if r.name == "transformers" or _STACKS_ALONE.get(r.name) == architecture]
    if lost:
        yield Finding(
            severity="error",
            key=name_all(alone),
            what=f"experts are stored one by one, and here {architecture} is read with stacks of them alone",
            fix="quantize with the experts kept (--keep '*.experts.*'), or load it by lowbit_hf.load",
            runtimes=tuple(lost),
        )
