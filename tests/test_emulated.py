"""The kernels for AVX512-BF16 and AMX wherever there is x86-64: their instructions as C functions, the same tests."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cache import CACHE_VARIABLE

HERE = Path(__file__).parent
OF_KERNELS = ("packed", "plain", "attention", "rowwise", "delta_net", "fused", "decoder_layer")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="needs x86-64 and gcc")
@pytest.mark.parametrize(("tiles", "kernel"), [("", "bfloat16 products"), ("1", "bfloat16 products in AMX")])
def test_kernels_for_other_processors_compute_the_same(tmp_path: Path, tiles: str, kernel: str) -> None:
    emulated = {"CC": str(HERE / "emulation" / "cc"), CACHE_VARIABLE: str(tmp_path), "EMULATED_TILES": tiles}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=HERE.parent, env=os.environ | emulated, capture_output=True, text=True)

    asked = run("-c", "import torch; from pipeline.kernels.packed import kernel_in_use; print(kernel_in_use())")
    assert asked.stdout.strip().endswith(kernel)
    tests = [str(HERE / f"test_{name}.py") for name in OF_KERNELS]
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *tests)
    assert tested.returncode == 0, tested.stdout[-5000:]
    assert " passed" in tested.stdout
