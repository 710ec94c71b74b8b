"""The kernels compiled ahead of time for GPUs that need not be there.

pytest runs them under the interpreter, so a process of its own compiles them: this file, run as a module.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = [80, 90, 100]
ABSENT_FACTORS = {"lr_factor": None, "grad_factor": None, "weight_factor": None, "radial": None}
# name: kernel, element types of w, g and m, other constants, bytes per element that are loaded and stored
CASES: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    "measure fp32": ("measure", "fp32 fp32 fp32", {"HAS_BUFFERS": False}, 8, 0),
    "measure fp32 with buffers": ("measure", "fp32 fp32 fp32", {"HAS_BUFFERS": True}, 12, 0),
    "measure bf16": ("measure", "bf16 bf16 bf16", {"HAS_BUFFERS": True}, 6, 0),
    "measure bf16, fp32 gradients": ("measure", "bf16 fp32 fp32", {"HAS_BUFFERS": True}, 10, 0),
    "update fp32": ("update", "fp32 fp32 fp32", ABSENT_FACTORS, 12, 8),
    "update fp32 with factors": ("update", "fp32 fp32 fp32", {}, 12, 8),
    "update fp32 without momentum": ("update", "fp32 fp32 fp32", {**ABSENT_FACTORS, "momentum": None}, 8, 4),
    "update bf16": ("update", "bf16 bf16 bf16", ABSENT_FACTORS, 6, 4),
    "update bf16 with factors": ("update", "bf16 bf16 bf16", {}, 6, 4),
    "update fp16": ("update", "fp16 fp16 fp16", ABSENT_FACTORS, 6, 4),
    "update bf16, fp32 gradients": ("update", "bf16 fp32 fp32", ABSENT_FACTORS, 10, 6),
    "finalize": ("finalize", "", {}, 0, 0),
}


def compile_cases() -> dict[str, Any]:
    """{case: {capability: PTX and resource usage}}, and the chunk and block size of a launch."""
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elropt.kernels import tables
    from elropt.kernels.measure import PARTIALS_PER_PASS, finalize_kernel, measure_kernel
    from elropt.kernels.update import update_kernel

    types = {"segments": "*i64", "chunk_segment": "*i32", "n_rows": "i32"}
    types |= dict.fromkeys(["lr", "momentum", "one_minus_dampening", "weight_decay"], "fp32")
    types |= dict.fromkeys(["partials", "sums", *ABSENT_FACTORS], "*fp32")
    kernels = {"measure": measure_kernel, "update": update_kernel, "finalize": finalize_kernel}
    elements = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}

    report: dict[str, Any] = {"chunk": tables.CHUNK, "threads": 32 * tables.NUM_WARPS}
    for case, (kernel, dtypes, constants, _, _) in CASES.items():
        function = kernels[kernel]
        constexprs = {"CHUNK": tables.CHUNK, **constants}
        options: dict[str, Any] = {}
        if kernel == "finalize":
            constexprs["BLOCK"] = PARTIALS_PER_PASS
        else:
            options["num_warps"] = tables.NUM_WARPS
            constexprs |= {k: elements[v] for k, v in zip("WGM", dtypes.split(), strict=True)}
        if kernel == "update":
            options["enable_fp_fusion"] = False
            constexprs |= {"NESTEROV": True, "MAXIMIZE": False}
        signature = {name: "constexpr" if name in constexprs else types[name] for name in function.arg_names}
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(function.arg_names)
            if signature[name].startswith("*")
        }
        source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attrs)
        report[case] = {}
        for capability in CAPABILITIES:
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
                usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            report[case][str(capability)] = {"ptx": compiled.asm["ptx"], "usage": usage}
    return report


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", __name__]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def wide_bytes(ptx: str, instruction: str) -> int:
    """Bytes that one thread moves with `instruction` (ld or st) in accesses of at least 128 bits."""
    accesses = re.findall(rf"\b{instruction}\.global\S*?\.v(\d)\.\w(\d+)", ptx)
    return sum(int(n) * int(bits) // 8 for n, bits in accesses if int(n) * int(bits) >= 128)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compiled: dict[str, Any], case: str, capability: int) -> None:
    result = compiled[case][str(capability)]
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", result["usage"])}
    assert 0 < usage["REG"] <= 128
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0)  # registers are spilled to the stack
    assert not re.search(r"\b(ld|st)\.local", result["ptx"])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "finalize"])
def test_full_chunks_are_accessed_128_bits_at_a_time(
    compiled: dict[str, Any], case: str, capability: int
) -> None:
    ptx = compiled[case][str(capability)]["ptx"]
    *_, loaded, stored = CASES[case]
    elements_per_thread = compiled["chunk"] // compiled["threads"]
    assert wide_bytes(ptx, "ld") == loaded * elements_per_thread
    assert wide_bytes(ptx, "st") == stored * elements_per_thread


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_added_up_by_atomics(compiled: dict[str, Any], capability: int) -> None:
    for case in CASES:
        assert not re.search(r"\b(atom|red)\.", compiled[case][str(capability)]["ptx"]), case


if __name__ == "__main__":
    json.dump(compile_cases(), sys.stdout)
