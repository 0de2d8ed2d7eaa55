"""`vllm serve` on a checkpoint, asked over HTTP; and what was measured, kept where LOWBIT_SERVING says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

START_S = 600


@pytest.fixture(scope="session")
def vllm():
    """The python of an environment with vLLM, lowbit-core and lowbit-hf."""
    python = os.environ.get("LOWBIT_VLLM")
    if python is None:
        pytest.skip("needs vLLM, beside the python that LOWBIT_VLLM names; `nox -s serving` makes its environment")
    return Path(python)


class Server:
    """A running server of one model, and what its start took."""

    def __init__(self, port, process, log):
        self.port, self.process, self.log, self.start_s = port, process, log, 0.0

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=1800) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def lines(self, word):
        return [line for line in self.log.read_text().splitlines() if word in line]

    def wait(self):
        began = time.monotonic()
        while self.process.poll() is None and time.monotonic() - began < START_S:
            try:
                self.get("/health")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
            else:
                self.start_s = time.monotonic() - began
                return self
        pytest.fail(
            f"vllm serve does not answer after {time.monotonic() - began:.0f} s:\n{self.log.read_text()[-6000:]}"
        )


@pytest.fixture
def serve(vllm, tmp_path):
    """`with serve(folder, *options) as server`: vLLM on a checkpoint that it calls "served"."""

    @contextmanager
    def serving(folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path / "log.txt"
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes most of the memory
            # Or it rounds inputs of int4 layers to int8 where a CPU has AMX, though the checkpoint says not to.
            "VLLM_CPU_INT4_W4A8": os.environ.get("VLLM_CPU_INT4_W4A8", "0"),
            "VLLM_CACHE_ROOT": str(tmp_path / "cache"),  # so that every start compiles, as the first one does
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
            "PATH": f"{vllm.parent}{os.pathsep}{os.environ['PATH']}",
        }
        # What `vllm serve` starts. The command itself looks for a distribution named vllm, which vllm-cpu 0.32 is not.
        command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "served"]
        command += ["--host", "127.0.0.1", "--port", str(port), *options]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            yield Server(port, process, log).wait()
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    return serving
