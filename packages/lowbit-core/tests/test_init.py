"""What `import lowbit` does to a process: next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf

SCRIPT = """
import json, sys, torch

def flags():
    backends = torch.backends
    return {
        "matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.is_warn_always_enabled()],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "tf32": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark],
        "reduced": [backends.cuda.matmul.allow_bf16_reduced_precision_reduction, backends.mkldnn.enabled],
        "swap": torch.__future__.get_swap_module_params_on_conversion(),
        "seed": torch.initial_seed(),
        "state": torch.get_rng_state().sum().item(),
    }

before, modules = flags(), set(sys.modules)
import lowbit
new = sorted(set(sys.modules) - modules)
after_import = flags()
lowbit.quantize(torch.ones(2, 32), "MXFP4").dequantize()
used = sorted(set(sys.modules) - modules)
print(json.dumps({"before": before, "import": after_import, "use": flags(), "modules": new, "used": used}))
"""


def test_import_is_light_and_changes_no_global_flag():
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lowbit", "-c", SCRIPT], capture_output=True, check=True, text=True
    )
    told = json.loads(done.stdout)
    assert told["import"] == told["before"]
    assert told["use"] == told["before"]
    packages = {name.partition(".")[0] for name in told["modules"]} - set(sys.stdlib_module_names)
    assert packages == {"lowbit", "safetensors"}
    # Backends are found when one is first needed, the reference among them.
    assert "lowbit.reference" not in told["modules"]
    assert "lowbit.reference" in told["used"]
    assert {"lowbit.testing", "lowbit.doctor", "lowbit.command"}.isdisjoint(told["used"])


CLOCK = """
import sys, time, torch
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
start = time.perf_counter()
import lowbit
print(time.perf_counter() - start)
"""


def test_import_takes_at_most_three_tenths_of_a_second_above_that_of_torch(tmp_path):
    """In the best of five processes: what a busy machine adds to one of them is not lowbit's."""
    best, runs = inf, 0
    while best > 0.3 and runs < 5:
        done = subprocess.run([sys.executable, "-c", CLOCK, tmp_path], capture_output=True, check=True, text=True)
        best, runs = min(best, float(done.stdout)), runs + 1
    assert best <= 0.3
