"""The kernels compiled ahead of time: registers, spills, shared memory and the width of their accesses.

    python -m benchmarks.speed.compile_report            # compile, and rewrite the table in kernels/README.md
    python -m benchmarks.speed.compile_report --json     # everything, the PTX too, on standard output

It needs triton, which brings the assembler and the disassembler along, but no GPU. `tests/kernels/test_compile.py`
checks the same cases against what they promise.
"""

from __future__ import annotations

import datetime
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from elropt import kernels as elr_kernels
from elropt.rules import RULES

README = Path(__file__).parents[2] / "kernels" / "README.md"
BEGIN, END = "<!-- compile report: begin -->", "<!-- compile report: end -->"

CAPABILITIES = (80, 90, 100)
THREADS_PER_WARP = 32
# Of a multiprocessor of sm_80, sm_90 and sm_100; a thread gets registers in units.
REGISTERS, THREADS, REGISTER_UNIT = 65_536, 2_048, 8


class Case(NamedTuple):
    """A kernel as it is launched, and the bytes per element that it is to load and to store 128 bits at a time.

    elements: the types of w, g and m. changes: what differs from a float32 step with momentum: constants, and the marks
    AMP, damped, rounded, of_update and protected for arguments that are otherwise absent.
    """

    kernel: str
    elements: str
    changes: dict[str, Any]
    loaded: int
    stored: int


def case(kernel: str, elements: str, loaded: int, stored: int, **changes: Any) -> Case:
    """A `Case` with its changes as keywords."""
    return Case(kernel, elements, changes, loaded, stored)


PROJECTED = {"PROJECT": True, "HAS_BUFFERS": True}
OF_UPDATE = {"of_update": True, "HAS_BUFFERS": True}  # elr_of="update"
PLAIN = {"grad_factor": None, "weight_factor": None, "radial": None, "SUMS": 0}
FP32, BF16, FP16, MIXED = "fp32 fp32 fp32", "bf16 bf16 bf16", "fp16 fp16 fp16", "bf16 fp32 fp32"
CASES = {
    "measure fp32": case("measure", FP32, 8, 0, memory=None, RULE=None),
    "measure fp32, warmup": case("measure", FP32, 8, 0, RULE="warmup"),
    "measure fp32, uniform, AMP": case("measure", FP32, 8, 0, RULE="uniform", AMP=True),
    "measure fp32, sphere of all, projected": case(
        "measure", FP32, 12, 0, RULE="sphere", WHOLE=True, damped=True, **PROJECTED
    ),
    "measure fp32, warmup, projected": case("measure", FP32, 12, 0, RULE="warmup", **PROJECTED),
    "measure bf16, angle": case("measure", BF16, 4, 0, RULE="angle"),
    "measure fp32, equilibrium": case("measure", FP32, 8, 0, RULE="equilibrium"),
    "measure fp32, uniform of updates, damped, AMP": case(
        "measure", FP32, 12, 0, RULE="uniform", damped=True, AMP=True, **OF_UPDATE
    ),
    "measure fp32, angle of updates": case("measure", FP32, 12, 0, RULE="angle", **OF_UPDATE),
    "measure fp32, equilibrium of all updates, damped": case(
        "measure", FP32, 12, 0, RULE="equilibrium", WHOLE=True, damped=True, **OF_UPDATE
    ),
    "measure fp32, equilibrium of updates, protected": case(
        "measure", FP32, 12, 0, RULE="equilibrium", protected=True, **OF_UPDATE
    ),
    "measure bf16, equilibrium of updates, protected": case(
        "measure", BF16, 6, 0, RULE="equilibrium", protected=True, **OF_UPDATE
    ),
    "measure bf16, projected": case("measure", BF16, 6, 0, **PROJECTED),
    "measure bf16, fp32 gradients": case("measure", MIXED, 10, 0, HAS_BUFFERS=True),
    "update fp32": case("update", FP32, 12, 8, **PLAIN),
    "update fp32, warmup": case("update", FP32, 12, 8, radial=None),
    "update fp32, projected, damped, AMP": case("update", FP32, 12, 8, SUMS=2, damped=True, AMP=True),
    "update fp32, of updates, damped, AMP": case(
        "update", FP32, 12, 8, SUMS=2, damped=True, AMP=True, of_update=True
    ),
    "update bf16, of updates": case("update", BF16, 6, 4, SUMS=2, of_update=True),
    "update fp32 without momentum": case("update", FP32, 8, 4, momenta=None, **PLAIN),
    "update bf16": case("update", BF16, 6, 4, **PLAIN),
    "update bf16, warmup": case("update", BF16, 6, 4, radial=None),
    "update bf16, rounded stochastically": case("update", BF16, 6, 4, rounded=True, **PLAIN),
    "update fp16": case("update", FP16, 6, 4, **PLAIN),
    "update bf16, fp32 gradients": case("update", MIXED, 10, 6, **PLAIN),
    "cooperative fp32, warmup": case("cooperative", FP32, 12, 8, RULE="warmup", radial=None),
    "cooperative fp32, uniform, AMP": case(
        "cooperative", FP32, 12, 8, RULE="uniform", weight_factor=None, radial=None, AMP=True
    ),
    # a cooperative launch that projects loads m twice
    "cooperative fp32, sphere, projected": case("cooperative", FP32, 16, 8, RULE="sphere", **PROJECTED),
    "cooperative fp32, warmup, projected, damped, AMP": case(
        "cooperative", FP32, 16, 8, RULE="warmup", NESTEROV=False, AMP=True, damped=True, **PROJECTED
    ),
    "cooperative bf16, fp32 gradients, warmup, projected, damped, AMP, rounded": case(
        "cooperative",
        MIXED,
        10,
        6,
        RULE="warmup",
        NESTEROV=False,
        AMP=True,
        damped=True,
        rounded=True,
        **PROJECTED,
    ),
    "cooperative fp32, equilibrium of updates, protected": case(
        "cooperative", FP32, 16, 8, RULE="equilibrium", protected=True, **OF_UPDATE
    ),
    "cooperative fp32, equilibrium of updates, protected, damped, AMP": case(
        "cooperative",
        FP32,
        16,
        8,
        RULE="equilibrium",
        NESTEROV=False,
        AMP=True,
        damped=True,
        protected=True,
        **OF_UPDATE,
    ),
    "cooperative fp32, angle of all updates": case(
        "cooperative", FP32, 16, 8, RULE="angle", WHOLE=True, **OF_UPDATE
    ),
    "cooperative bf16, fp32 gradients, uniform of updates, damped, AMP, rounded": case(
        "cooperative",
        MIXED,
        10,
        6,
        RULE="uniform",
        NESTEROV=False,
        AMP=True,
        damped=True,
        rounded=True,
        **OF_UPDATE,
    ),
    "cooperative bf16, warmup": case("cooperative", BF16, 6, 4, RULE="warmup", radial=None),
}

Report = dict[str, dict[str, dict[str, Any]]]


def compile_cases() -> Report:
    """{case: {capability: what `examine` found}}.

    Not for a process in which TRITON_INTERPRET is set: there the kernels are Python.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = ("args", "decide", "measure", "update", "cooperative", "tables")
    args, decide, measure, update, cooperative, tables = (
        importlib.import_module(f"elropt.kernels.{name}") for name in names
    )
    kernels: dict[str, Any] = {
        "measure": measure.measure_kernel,
        "update": update.update_kernel,
        "cooperative": cooperative.cooperative_kernel,
    }
    elements = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    elements_per_thread = tables.CHUNK // (THREADS_PER_WARP * tables.NUM_WARPS)
    constants: dict[str, Any] = {
        "RULE": None, "WHOLE": False, "PROJECT": False, "HAS_BUFFERS": False,
        "SUMS": 1, "NESTEROV": True, "MAXIMIZE": False, "CHUNK": tables.CHUNK,
    }  # fmt: skip

    report: Report = {}
    for name, case in CASES.items():
        function = kernels[case.kernel]
        types = argument_types(args, case)
        of_elements = (elements[dtype] for dtype in case.elements.split())
        constexprs = {**constants, **dict(zip("WGM", of_elements, strict=True)), **case.changes}
        if case.kernel != "update" and types["rows"].memory is not None:
            of_update = case.changes.get("of_update")
            constexprs["RULE"] = (decide.UPDATE_RULES if of_update else decide.RULES)[constexprs["RULE"]]
        signature = {arg: types.get(arg, "constexpr") for arg in function.arg_names}
        values: dict[tuple[int, ...], Any] = {
            (i,): constexprs[arg] for i, arg in enumerate(signature) if signature[arg] == "constexpr"
        }
        attrs: dict[tuple[int, ...], Any] = {}
        for i, of_argument in enumerate(signature.values()):
            for path, of_field in paths((i,), of_argument):
                if of_field is None:
                    values[path] = None
                elif of_field.startswith("*"):
                    attrs[path] = [["tt.divisibility", 16]]
        options: dict[str, Any] = {"num_warps": tables.NUM_WARPS, "enable_fp_fusion": False}
        if case.kernel == "cooperative":
            options |= {"maxnreg": cooperative.MAX_REGISTERS, "launch_cooperative_grid": True}
        elif case.kernel == "measure" and "damped" in case.changes:
            options |= {"maxnreg": measure.MAX_REGISTERS_WITH_DAMPENING}
        signature = {arg: without_none(of_argument) for arg, of_argument in signature.items()}
        source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attrs)
        report[name] = {}
        for capability in CAPABILITIES:
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            report[name][str(capability)] = examine(compiled, elements_per_thread)
    return report


def argument_types(args: Any, case: Case) -> dict[str, Any]:
    """Of the arguments of a kernel that are no constants: Triton's names of types, in groups as in `kernels.args`; None
    for what is absent."""
    changes = case.changes
    rule = changes.get("RULE")
    is_absent = {
        name for name in ("grad_factor", "weight_factor", "radial", "momenta") if changes.get(name, 0) is None
    }
    of_groups: dict[str, Any] = dict.fromkeys(args.Hypers._fields, ("fp32", "fp32"))
    if not changes.get("damped"):
        is_absent.add("one_minus_dampening")
    if not changes.get("of_update"):
        is_absent |= {"lr_factor", "of_momentum"}
    if case.kernel == "measure":
        is_absent.add("momenta")
    if case.kernel == "update":
        is_absent |= {"gains", "per_grads", "per_momenta"}
    if rule != "equilibrium":
        is_absent.add("settlings")
    if not changes.get("protected"):
        is_absent.add("diffusions")
    factors = {name: None if name in is_absent else "*fp32" for name in args.Factors._fields}
    scaling = "*fp32" if changes.get("AMP") else None
    least_size = "*fp32" if changes.get("protected") else None
    rows = args.Rows("*fp32", "*fp32" if RULES[rule].ends else None, "*fp32", "*fp32", "*i32", least_size)
    if changes.get("memory", 0) is None:
        rows = args.Rows()
    return {
        "tables": args.Tables("*i64", "*i64", "*i32"),
        "scratch": args.Scratch(
            "*fp32",
            "*fp32",
            "*i32",
            "*i32" if case.kernel == "cooperative" else None,
            None if "of_momentum" in is_absent else "*fp32",
        ),
        **dict.fromkeys(("n_rows", "n_deciding", "read_all", "read_momentum"), "i32"),
        "rows": rows,
        "lrs": ("fp32", "*fp32"),
        "hypers": args.Hypers(**{k: None if k in is_absent else v for k, v in of_groups.items()}),
        "factors": args.Factors(**factors),
        "rounding": args.Rounding("i64", "*i64") if changes.get("rounded") else None,
        "partials": "*fp32",
        "grad_scale": scaling,
        "found_inf": scaling,
    }


def paths(path: tuple[int, ...], of_argument: Any) -> list[tuple[tuple[int, ...], str | None]]:
    """Every type that an argument is made of, with where it stands among the arguments."""
    if not isinstance(of_argument, tuple):
        return [(path, of_argument)]
    return [found for i, of_field in enumerate(of_argument) for found in paths((*path, i), of_field)]


def without_none(of_argument: Any) -> Any:
    """The types of an argument as Triton wants them: what is None is a constant."""
    if not isinstance(of_argument, tuple):
        return "constexpr" if of_argument is None else of_argument
    fields = map(without_none, of_argument)
    return type(of_argument)(*fields) if hasattr(of_argument, "_fields") else tuple(fields)


def examine(compiled: Any, elements_per_thread: int) -> dict[str, Any]:
    """What a compiled kernel needs and does.

    registers: of a thread. stack, local: bytes per thread; 0 unless registers were spilled there. static_shared,
    launch_shared: bytes of shared memory per program, in the binary and given at the launch. loaded, stored: bytes per
    element in accesses of 128 bits. threads: of a program. ptx.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", printed)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "static_shared": usage["SHARED"],
        "launch_shared": compiled.metadata.shared,
        "loaded": wide_bytes(ptx, "ld") / elements_per_thread,
        "stored": wide_bytes(ptx, "st") / elements_per_thread,
        "threads": THREADS_PER_WARP * compiled.metadata.num_warps,
        "ptx": ptx,
    }


def wide_bytes(ptx: str, instruction: str) -> int:
    """Bytes of tensors that one thread moves with `instruction` (ld or st) in accesses of at least 128 bits.

    Partial sums, which other programs wrote, are loaded past the first cache (.cg).
    """
    accesses = re.findall(rf"\b{instruction}\.global(?!\.cg)\S*?\.v(\d)\.\w(\d+)", ptx)
    return sum(int(n) * int(bits) // 8 for n, bits in accesses if int(n) * int(bits) >= 128)


def programs_per_multiprocessor(registers: int, threads: int) -> int:
    """How many programs of so many threads fit the registers of a multiprocessor, and its threads."""
    allocated = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(REGISTERS // (allocated * threads), THREADS // threads)


def table_of(report: Report, triton_version: str, date: datetime.date) -> str:
    """The report as Markdown, a line for each case; what differs between the targets in the order of CAPABILITIES."""
    targets = " / ".join(f"sm_{capability}" for capability in CAPABILITIES)
    lines = [
        f"triton {triton_version}, {date.isoformat()}, for {targets}: one number where all agree.",
        f"*Programs*: what {REGISTERS:,} registers hold on a multiprocessor. *Spilled*: bytes of stack per thread.",
        "*Shared*: bytes in the binary (the 1,024 are the system's own) + given at the launch.",
        "*Loaded*, *stored*: bytes per element, 128 bits at a time.",
        "",
        "| case | registers | programs | spilled | shared | loaded | stored |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in report.items():
        columns = [
            (
                str(r["registers"]),
                str(programs_per_multiprocessor(r["registers"], r["threads"])),
                str(r["stack"]),
                f"{r['static_shared']:,}+{r['launch_shared']:,}",
                f"{r['loaded']:g}",
                f"{r['stored']:g}",
            )
            for r in (results[str(capability)] for capability in CAPABILITIES)
        ]
        cells = [of[0] if len(set(of)) == 1 else " / ".join(of) for of in zip(*columns, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def split_at_table(text: str) -> tuple[str, str, str]:
    """What precedes the table, the table, and what follows it.

    Raises:
        ValueError: the two comments that enclose the table are not there, once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the table belongs between one line {BEGIN!r} and, after it, one line {END!r}")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return before + BEGIN, table.strip("\n"), END + after


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    readme: Annotated[
        Path, typer.Option(help="File whose table is rewritten.", show_default="kernels/README.md")
    ] = README,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, the PTX too, instead of rewriting the table.")
    ] = False,
) -> None:
    """Compile the kernels for sm_80, sm_90 and sm_100 and report registers, spills and the width of accesses.

    Example: python -m benchmarks.speed.compile_report --readme kernels/README.md
    """
    if not elr_kernels.available():
        raise typer.BadParameter(f"{elr_kernels.why_unavailable()}; this needs triton: pip install triton")
    import triton
    from triton import knobs

    if knobs.runtime.interpret:
        raise typer.BadParameter(
            "TRITON_INTERPRET is set, so the kernels are not compiled: unset TRITON_INTERPRET"
        )
    if as_json:
        print(json.dumps(compile_cases()))
        return
    try:
        before, _, after = split_at_table(readme.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--readme") from error
    table = table_of(compile_cases(), triton.__version__, datetime.datetime.now(datetime.UTC).date())
    readme.write_text(f"{before}\n{table}\n{after}", encoding="utf-8")
    typer.echo(f"wrote {readme}")


if __name__ == "__main__":
    app()
