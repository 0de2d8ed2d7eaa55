"""Run by vLLM's python: which of these folders it loads, and what it answers; a line of JSON for each.

python loads.py TOKENS FOLDER... ; TOKENS is JSON, the token ids of the prompts.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[1])]
greedy = SamplingParams(temperature=0, max_tokens=32, logprobs=1, ignore_eos=True)
for folder in map(Path, sys.argv[2:]):
    told = {"folder": str(folder)}
    llm = None
    try:
        llm = LLM(str(folder), enforce_eager=True, max_model_len=64, disable_log_stats=True)
        answers = [answer.outputs[0] for answer in llm.generate(prompts, greedy, use_tqdm=False)]
        told["tokens"] = [list(answer.token_ids) for answer in answers]
        told["logs"] = [
            [one[token].logprob for one, token in zip(a.logprobs, a.token_ids, strict=True)] for a in answers
        ]
    except Exception as error:  # noqa: BLE001 - any is an answer
        told["error"] = f"{type(error).__name__}: {error}"
    sys.stdout.write("told " + json.dumps(told) + "\n")
    sys.stdout.flush()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
