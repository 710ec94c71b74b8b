"""One contract for every backend × rule: the iterates are the NumPy oracle's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elropt import ELRSGD
from elropt.rules import RULES as SPECS

from .every_rule import FORMS, acts_on_update, has_kernels, needs, skip_without_kernels
from .oracle import Oracle, invariant_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"reference": {"foreach": False}, "foreach": {"foreach": True}, "triton": {"fused": True}}
RULES = [form for form in FORMS if not SPECS[form[0]].ends]
TOLERANCES = {torch.float64: 2e-6, torch.float32: 2e-5, torch.bfloat16: 3e-2}  # factors are float32
SHAPES = [(4, 6), (3, 2, 3, 3), (5, 3)]


def dtypes_of(backend: str) -> list[torch.dtype]:
    # The interpreter truncates where a GPU rounds to bfloat16, so there the kernels' bfloat16 is a GPU test.
    if backend == "triton":
        return [torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]
    return [torch.float64, torch.float32, torch.bfloat16]


def run_both(
    backend: str,
    dtype: torch.dtype,
    rule: str | None,
    granularity: str,
    steps: int,
    lr: float,
    seed: int = 0,
    flagged: bool = True,
    **hyper: Any,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights of the package and of the oracle after the same number of steps from the same weights.

    flagged: whether the group says that they are scale-invariant; if not, it is measured."""
    rng = np.random.default_rng(seed)
    scales = (0.1, 1.0, 10.0)
    weights = [
        torch.tensor(rng.normal(size=shape) * s).to(dtype) for shape, s in zip(SHAPES, scales, strict=True)
    ]
    gradients = [invariant_gradient(rng.normal(size=shape), granularity == "filter") for shape in SHAPES]
    layouts = [
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.t().contiguous().t(),
    ]
    if (backend, granularity) == ("triton", "filter"):
        layouts[2] = layouts[0]  # the kernels want each filter in one piece
    params = [torch.nn.Parameter(layout(w).to(DEVICE)) for layout, w in zip(layouts, weights, strict=True)]
    hyper = {"rule": rule, "granularity": granularity, **needs(rule, 0.05), **hyper}
    group = {"params": params, **({"scale_invariant": True} if flagged else {})}
    optimizer = ELRSGD([group], lr=lr, **hyper, **BACKENDS[backend])
    oracle = Oracle([w.double().numpy() for w in weights], flagged=flagged, **hyper)
    for _ in range(steps):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(torch.tensor(gradient(p.detach().double().cpu().numpy())))
        optimizer.step()
        oracle.step([gradient(w) for w, gradient in zip(oracle.weights, gradients, strict=True)], lr)
    ours = [p.detach().double().cpu().numpy() for p in params]
    return oracle.same_norm(ours), oracle.weights


def assert_same(ours: list[np.ndarray], expected: list[np.ndarray], rtol: float, message: object) -> None:
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < rtol, f"weight {i} differs by {error:.2e} > {rtol:.0e}: {message}"


HYPER = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.5, "dampening": 0.3, "maximize": True},
]


CASES = [
    (backend, *form, project, hyper)
    for backend in BACKENDS
    for form in RULES
    for project in (False, True)
    for hyper in HYPER
    if not (project and acts_on_update(form[0], form[2]))
    # Triton's interpreter takes long
    if backend != "triton" or hyper in HYPER[2:] or not (acts_on_update(form[0], form[2]) or needs(form[0]))
]


@pytest.mark.parametrize(
    ("backend", "rule", "granularity", "elr_of", "project", "hyper", "dtype"),
    [(*case, dtype) for case in CASES for dtype in dtypes_of(case[0])],
    ids=str,
)
def test_iterates_are_those_of_the_oracle(
    backend: str,
    dtype: torch.dtype,
    rule: str | None,
    granularity: str,
    elr_of: str | None,
    project: bool,
    hyper: dict[str, Any],
) -> None:
    skip_without_kernels(BACKENDS[backend], rule, elr_of)
    lr = 0.1 if rule == "sphere" and granularity != "network" else 0.01
    steps = 1 if dtype == torch.bfloat16 else 5
    hyper = {**hyper, "elr_of": elr_of, "project": project}
    ours, expected = run_both(backend, dtype, rule, granularity, steps, lr, **hyper)
    assert_same(ours, expected, TOLERANCES[dtype], (backend, rule, granularity, hyper))


@pytest.mark.parametrize(
    ("rule", "granularity"), [form[:2] for form in RULES if form[2] == "update"], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_found_to_be_invariant_turn_alike(backend: str, rule: str, granularity: str) -> None:
    """There decay enters the momentum, and the update leaves its radial part out."""
    skip_without_kernels(BACKENDS[backend], rule, "update")
    hyper = {"momentum": 0.9, "weight_decay": 0.05, "elr_of": "update"}
    ours, expected = run_both(backend, torch.float32, rule, granularity, 5, 0.01, flagged=False, **hyper)
    assert_same(ours, expected, TOLERANCES[torch.float32], (backend, rule, granularity))


@settings(deadline=None, max_examples=60)
@given(
    backend=st.sampled_from(list(BACKENDS)),
    form=st.sampled_from(RULES),
    lr=st.floats(1e-4, 0.5),
    momentum=st.floats(0, 0.95),
    dampening=st.floats(0, 0.9),
    weight_decay=st.floats(0, 0.1),
    project=st.booleans(),
    maximize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_hyper_parameters(
    backend: str,
    form: tuple[str | None, str, str | None],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    project: bool,
    maximize: bool,
    seed: int,
) -> None:
    rule, granularity, elr_of = form
    assume("fused" not in BACKENDS[backend] or has_kernels(rule, elr_of))
    hyper = {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay or needs(rule).get("weight_decay", 0.0),
        "elr_of": elr_of,
        "project": project and elr_of != "update",
        "maximize": maximize,
    }
    dtype = torch.float32 if backend == "triton" else torch.float64
    ours, expected = run_both(backend, dtype, rule, granularity, steps=3, lr=lr, seed=seed, **hyper)
    assert_same(ours, expected, 1e-4 if backend == "triton" else 1e-5, hyper)
