"""Every specialization of the kernels that the host can ask for: recorded on the host, compiled without a GPU.

    python -m tests.kernels.specializations pairs          # every pair of options, up to Triton's own code (TTIR)
    python -m tests.kernels.specializations all            # every combination that changes the code, up to TTIR
    python -m tests.kernels.specializations assembled      # the pairs, up to machine code, for three GPUs

prints JSON: {"compiled": how many, "failed": {kernel and options: error}, "spilled": {…: bytes of stack}}. Not for a
process in which TRITON_INTERPRET is set: there the kernels are Python.

No signature is written down here. `ELRSGD`, `measure` and `update` run on the CPU with the options asked for, Triton
itself works out the types of what they hand to a kernel, and is stopped before it compiles.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from elropt import ELRSGD, kernels
from elropt._group_values import rule_key
from elropt._validate import check_decay, validate_choices
from elropt.kernels import cooperative, fused_step, tables
from elropt.rules import RULES

Options = dict[str, Any]

CAPABILITIES = (80, 90, 100)
DEFAULTS = ELRSGD([nn.Parameter(torch.ones(1))], fused=True).defaults
WEIGHT = nn.Parameter(torch.ones(4, 5))
W_DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Of an optimizer: those that change the code of a kernel …
CODE: dict[str, list[Any]] = {
    "rule": list(RULES),
    "granularity": ["layer", "filter", "network"],
    "elr_of": [None, "gradient", "update"],
    "project": [False, True],
    "momentum": [0.9, 0.0],
    "dampening": [0.0, 0.3],
    "nesterov": [False, True],
    "maximize": [False, True],
    "weight_decay": [5e-4, 0.0],
    "stochastic_rounding": [None, 7],
    "scaled": [False, True],  # by torch.amp.GradScaler
    "launches": ["two", "one"],
}
# … and those that change the types and the alignment of what it is given.
TYPES: dict[str, list[Any]] = {
    "w": W_DTYPES,
    "wide_grads": [False, True],  # gradients in float32, whatever the weights are
    "wide_buffers": [False, True],
    "groups": [1, 2, 9],
    "lr": ["float", "tensor", "mixed"],
    "tensors": [4, 3],  # in a group; 4 rows leave the vectors of factors aligned
    "protect": [None, False],
}
# Of the functions `measure` and `update`.
FUNCTIONS: dict[str, list[Any]] = {
    "momentum": [0.9, 0.0],
    "dampening": [0.0, 0.3],
    "nesterov": [False, True],
    "maximize": [False, True],
    "weight_decay": [5e-4, 0.0],
    "grad_factor": [False, True],
    "weight_factor": [False, True],
    "radial": [False, True],
    "lr_factor": [False, True],
    "with_update": [False, True],
    "lr": ["float", "tensor"],
    "per_filter": [False, True],
} | {name: TYPES[name] for name in ("w", "wide_grads", "wide_buffers", "tensors")}


class Specialization(NamedTuple):
    """A kernel and everything that Triton compiles it for."""

    source: ASTSource
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        return self.source.fn.__name__

    @property
    def key(self) -> str:
        constants = sorted((path, str(value)) for path, value in self.source.constants.items())
        return repr((self.kernel, self.source.signature, constants, sorted(self.source.attrs.items())))


class NoGPU:
    """A driver with just what a launch asks for before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Recorder:
    """Notes launches instead of making them. found: by `Specialization.key`."""

    def __init__(self) -> None:
        self.found: dict[str, Specialization] = {}
        triton.runtime.driver.set_active(NoGPU())
        JITFunction._do_compile = lambda function, *arguments, **_: self._note(function, *arguments)
        tables.DEVICE_TYPE = "cpu"

    def _note(
        self,
        function: Any,
        key: Any,
        signature: Any,
        device: int,
        constants: Any,
        all_options: Any,
        attrs: Any,
        *_: Any,
    ) -> None:
        """Replaces the method of Triton that compiles. (Its `jit_cache_hook` would do, but in triton 3.6 it fails on a
        function among the constants.)"""
        options = {name: getattr(all_options, name) for name in ("num_warps", "enable_fp_fusion", "maxnreg")}
        if function is cooperative.cooperative_kernel:  # the host gives these to launches on a GPU alone
            options |= {"maxnreg": cooperative.MAX_REGISTERS, "launch_cooperative_grid": True}
        source = ASTSource(function, signature, constants, attrs)
        found = Specialization(source, options)
        self.found.setdefault(found.key, found)

    def step(self, options: Options) -> None:
        """A step of an optimizer with these options."""
        fused_step.max_programs = lambda device: 10**6 if options["launches"] == "one" else 0
        groups = [[_tensors(options) for _ in range(options["tensors"])] for _ in range(options["groups"])]
        lrs = {"float": [0.1], "tensor": [torch.tensor(0.1)], "mixed": [0.1, torch.tensor(0.1)]}[
            options["lr"]
        ]
        optimizer = ELRSGD(
            [
                {"params": [w for w, _, _ in group], "scale_invariant": True, "lr": lr}
                for group, lr in zip(groups, itertools.cycle(lrs), strict=False)
            ],
            fused=True,
            **_arguments(options),
        )
        if options["scaled"]:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        if options["momentum"] != 0:
            for w, _, m in itertools.chain(*groups):
                optimizer.state[w]["momentum_buffer"] = m
        optimizer.step()

    def call_functions(self, options: Options) -> None:
        """A call of `measure` and one of `update`."""
        tensors = [_tensors(options) for _ in range(options["tensors"])]
        params, grads, buffers = (list(of) for of in zip(*tensors, strict=True))
        if options["momentum"] == 0:
            buffers = [None] * len(params)
        wanted = {name: options[name] for name in ("per_filter", "with_update")}
        kernels.measure(params, grads, buffers, **wanted)
        count = params[0].shape[0] if options["per_filter"] else 1
        rows = [(i * count, count) for i in range(len(params))]
        factors = ("grad_factor", "weight_factor", "radial", "lr_factor")
        names = ("momentum", "dampening", "nesterov", "maximize", "weight_decay")
        kernels.update(
            params,
            grads,
            buffers,
            lr=torch.tensor(0.1) if options["lr"] == "tensor" else 0.1,
            rows=rows,
            **{name: torch.ones(count * len(params)) for name in factors if options[name]},
            **{name: options[name] for name in names},
        )


def _tensors(options: Options) -> tuple[nn.Parameter, Tensor, Tensor]:
    """A parameter, which has a gradient, and a momentum buffer for it."""
    w = nn.Parameter(torch.ones_like(WEIGHT, dtype=options["w"]))
    w.grad_dtype = None  # any
    w.grad = torch.ones(4, 5, dtype=torch.float32 if options["wide_grads"] else options["w"])
    m = torch.ones(4, 5, dtype=torch.float32 if options["wide_buffers"] else options["w"])
    return w, w.grad, m


def _arguments(options: Options) -> Options:
    """The options that are arguments of the optimizer."""
    return {name: options[name] for name in (*CODE, "protect") if name not in ("scaled", "launches")}


def allowed(options: Options) -> bool:
    """Whether the optimizer takes these options, by its own check."""
    group = {**DEFAULTS, **_arguments(options), "params": [WEIGHT], "scale_invariant": True}
    try:
        validate_choices(group)
        check_decay(group)
    except ValueError:
        return False
    key = rule_key(group)
    is_fused = kernels.has_rule(key.rule, of_update=key.of_update, protect=key.protect)
    return is_fused or options["stochastic_rounding"] is None  # a step that is not fused cannot round so


def function_allowed(options: Options) -> bool:
    return not options["nesterov"] or (options["momentum"] != 0 and options["dampening"] == 0)


def covering(choices: dict[str, list[Any]], is_allowed: Callable[[Options], bool]) -> list[Options]:
    """Options in which every allowed pair of values occurs at least once. Chosen greedily, from the same random
    candidates at every call. A pair counts as refused if 300 random completions of it are."""
    rng = random.Random(0)

    def candidates(fixed: Options, number: int) -> Iterator[Options]:
        for _ in range(number):
            options = {name: rng.choice(values) for name, values in choices.items()} | fixed
            if is_allowed(options):
                yield options

    chosen: list[Options] = []
    left = set(all_pairs(choices))
    for pair in sorted(left, key=str):
        if pair not in left:
            continue
        best = max(
            candidates(dict(pair), 60) or (), key=lambda options: len(left & pairs_in(options)), default=None
        ) or next(candidates(dict(pair), 300), None)
        if best is not None:
            chosen.append(best)
            left -= pairs_in(best)
    return chosen


def all_pairs(choices: dict[str, list[Any]]) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """All pairs of values of two options, refused ones too."""
    for a, b in itertools.combinations(choices, 2):
        for x, y in itertools.product(choices[a], choices[b]):
            yield (a, x), (b, y)


def pairs_in(options: Options) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(options.items(), 2))


def every_code() -> Iterator[Options]:
    """Every allowed combination of the options that change the code, each with random types and alignment."""
    rng = random.Random(0)
    for values in itertools.product(*CODE.values()):
        types = {name: rng.choice(of) for name, of in TYPES.items()}
        options = dict(zip(CODE, values, strict=True)) | types
        if options["stochastic_rounding"] is not None:
            options["w"] = torch.bfloat16  # others are never rounded
        if allowed(options):
            yield options


def recorded(of_optimizer: Iterable[Options], of_functions: Iterable[Options] = ()) -> list[Specialization]:
    recorder = Recorder()
    for options in of_optimizer:
        recorder.step(options)
    for options in of_functions:
        recorder.call_functions(options)
    return list(recorder.found.values())


def compile_to_ttir(specialization: Specialization) -> None:
    """Compile to Triton's own representation: a wrong program is refused before that."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(specialization.options))
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    source = specialization.source
    source.make_ir(target, options, codegen, backend.get_module_map(), context)


def stack_bytes(specialization: Specialization, capability: int) -> int:
    """Compile to machine code. Returns the bytes of stack per thread, to which registers are spilled."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(specialization.source, target=target, options=specialization.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", printed))


def root_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"


def main(what: str) -> dict[str, Any]:
    if what == "all":
        found = recorded(every_code(), covering(FUNCTIONS, function_allowed))
    else:
        found = recorded(covering(CODE | TYPES, allowed), covering(FUNCTIONS, function_allowed))
    kernels_found: dict[str, int] = {}
    failed: dict[str, str] = {}
    spilled: dict[str, int] = {}
    for specialization in found:
        kernels_found[specialization.kernel] = kernels_found.get(specialization.kernel, 0) + 1
        try:
            if what != "assembled":
                compile_to_ttir(specialization)
                continue
            for capability in CAPABILITIES:
                stack = stack_bytes(specialization, capability)
                if stack > 0:
                    spilled[f"sm_{capability} {specialization.key}"] = stack
        except Exception as error:
            failed[specialization.key] = root_cause(error)
    return {"compiled": kernels_found, "failed": failed, "spilled": spilled}


if __name__ == "__main__":
    if knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, so the kernels are not compiled: unset TRITON_INTERPRET")
    print(json.dumps(main(sys.argv[1])))
