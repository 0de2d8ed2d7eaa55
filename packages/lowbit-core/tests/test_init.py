"""What `import lowbit` does to a process: next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys

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
    assert packages <= {"lowbit", "numpy", "safetensors", "torch"}
    # Backends are found when one is first needed, the reference among them.
    assert "lowbit.reference" not in told["modules"]
    assert "lowbit.reference" in told["used"]
    assert {"lowbit.testing", "lowbit.doctor", "lowbit.command"}.isdisjoint(told["used"])
