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
PLAIN = {"grad_factor": None, "weight_factor": None, "radial": None, "lr_factor": None, "SUMS": 0}
# name: kernel, element types of w, g and m, other constants, bytes per element that are loaded and stored
CASES: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    "measure fp32": ("measure", "fp32 fp32 fp32", {"memory": None, "RULE": None}, 8, 0),
    "measure fp32, warmup": ("measure", "fp32 fp32 fp32", {"RULE": "warmup"}, 8, 0),
    "measure fp32, uniform, AMP": ("measure", "fp32 fp32 fp32", {"RULE": "uniform", "AMP": True}, 8, 0),
    "measure fp32, sphere of all, projected": (
        "measure",
        "fp32 fp32 fp32",
        {"RULE": "sphere", "WHOLE": True, "PROJECT": True, "DAMPED": True, "HAS_BUFFERS": True},
        12,
        0,
    ),
    "measure bf16, angle": ("measure", "bf16 bf16 bf16", {"RULE": "angle"}, 4, 0),
    "measure bf16, projected": ("measure", "bf16 bf16 bf16", {"PROJECT": True, "HAS_BUFFERS": True}, 6, 0),
    "measure bf16, fp32 gradients": ("measure", "bf16 fp32 fp32", {"HAS_BUFFERS": True}, 10, 0),
    "update fp32": ("update", "fp32 fp32 fp32", PLAIN, 12, 8),
    "update fp32, warmup": ("update", "fp32 fp32 fp32", {"radial": None}, 12, 8),
    "update fp32, projected, damped, AMP": (
        "update",
        "fp32 fp32 fp32",
        {"SUMS": 2, "damped": True, "AMP": True},
        12,
        8,
    ),
    "update fp32 without momentum": ("update", "fp32 fp32 fp32", {**PLAIN, "momenta": None}, 8, 4),
    "update bf16": ("update", "bf16 bf16 bf16", PLAIN, 6, 4),
    "update bf16, warmup": ("update", "bf16 bf16 bf16", {"radial": None}, 6, 4),
    "update bf16, rounded stochastically": ("update", "bf16 bf16 bf16", {**PLAIN, "rounded": True}, 6, 4),
    "update fp16": ("update", "fp16 fp16 fp16", PLAIN, 6, 4),
    "update bf16, fp32 gradients": ("update", "bf16 fp32 fp32", PLAIN, 10, 6),
    "cooperative fp32, warmup": ("cooperative", "fp32 fp32 fp32", {"RULE": "warmup", "radial": None}, 12, 8),
    "cooperative fp32, uniform, AMP": (
        "cooperative",
        "fp32 fp32 fp32",
        {"RULE": "uniform", "lr_factor": None, "weight_factor": None, "radial": None, "AMP": True},
        12,
        8,
    ),
    "cooperative fp32, sphere, projected": (
        "cooperative",
        "fp32 fp32 fp32",
        {"RULE": "sphere", "lr_factor": None, "PROJECT": True, "HAS_BUFFERS": True},
        12,
        8,
    ),
    "cooperative bf16, warmup": ("cooperative", "bf16 bf16 bf16", {"RULE": "warmup", "radial": None}, 6, 4),
}


def compile_cases() -> dict[str, Any]:
    """{case: {capability: PTX and resource usage}}, and the chunk and block size of a launch."""
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elropt.kernels import cooperative, tables
    from elropt.kernels.measure import measure_kernel
    from elropt.kernels.update import update_kernel

    types: dict[str, Any] = {"addresses": "*i64", "segments": "*i64", "chunk_segment": "*i32"}
    types |= {"counters": "*i32", "gate": "*i32", "group_of_row": "*i32", "step": "*i64", "seed": "i64"}
    types |= dict.fromkeys(["n_rows", "read_all", "read_momentum", "n_deciding"], "i32")
    tuples = ["lrs", "momenta", "keeps", "decays", "gains", "per_grads", "per_momenta"]
    types |= dict.fromkeys(tuples, ("fp32", "fp32")) | {"lrs": ("fp32", "*fp32")}
    constants: dict[str, Any] = {
        "RULE": None, "WHOLE": False, "PROJECT": False, "DAMPED": False, "HAS_BUFFERS": False,
        "SUMS": 1, "NESTEROV": True, "MAXIMIZE": False, "CHUNK": tables.CHUNK,
    }  # fmt: skip
    kernels = {"measure": measure_kernel, "update": update_kernel, "cooperative": cooperative.cooperative_kernel}
    elements = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}

    report: dict[str, Any] = {}
    for case, (kernel, dtypes, changes, _, _) in CASES.items():
        function = kernels[kernel]
        changes = dict(changes)
        constexprs = {**constants, **dict(zip("WGM", (elements[d] for d in dtypes.split()), strict=True))}
        if not changes.pop("AMP", False):
            constexprs |= {"grad_scale": None, "found_inf": None}
        if not changes.pop("damped", False):
            constexprs["keeps"] = None
        if not changes.pop("rounded", False):
            constexprs |= {"seed": None, "step": None}
        constexprs |= changes
        constexprs = {k: v for k, v in constexprs.items() if k in function.arg_names}
        if constexprs.get("RULE") != "warmup" and kernel != "update":
            constexprs["handed_over"] = None
        signature = {
            name: "constexpr" if name in constexprs else types.get(name, "*fp32") for name in function.arg_names
        }
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(function.arg_names)
            if isinstance(signature[name], str) and signature[name].startswith("*")
        }
        options: dict[str, Any] = {"num_warps": tables.NUM_WARPS}
        if kernel != "measure":
            options["enable_fp_fusion"] = False
        if kernel == "cooperative":
            options |= {"maxnreg": cooperative.MAX_REGISTERS, "launch_cooperative_grid": True}
        source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attrs)
        report[case] = {"elements_per_thread": constexprs["CHUNK"] // (32 * options["num_warps"])}
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
    """Bytes of tensors that one thread moves with `instruction` (ld or st) in accesses of at least 128 bits.

    Partial sums, which other programs wrote, are loaded past the first cache (.cg).
    """
    accesses = re.findall(rf"\b{instruction}\.global(?!\.cg)\S*?\.v(\d)\.\w(\d+)", ptx)
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
@pytest.mark.parametrize("case", CASES)
def test_full_chunks_are_accessed_128_bits_at_a_time(
    compiled: dict[str, Any], case: str, capability: int
) -> None:
    ptx = compiled[case][str(capability)]["ptx"]
    *_, loaded, stored = CASES[case]
    elements_per_thread = compiled[case]["elements_per_thread"]
    assert wide_bytes(ptx, "ld") == loaded * elements_per_thread
    assert wide_bytes(ptx, "st") == stored * elements_per_thread


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_atomics_count_programs_and_add_up_nothing(compiled: dict[str, Any], capability: int) -> None:
    for case, (kernel, *_) in CASES.items():
        ptx = compiled[case][str(capability)]["ptx"]
        atomics = re.findall(r"\b(?:atom|red)\.\S+", ptx)
        assert all(name == "atom.global.gpu.acq_rel.add.u32" for name in atomics), (case, atomics)
        assert bool(atomics) == (kernel != "update"), case


if __name__ == "__main__":
    json.dump(compile_cases(), sys.stdout)
