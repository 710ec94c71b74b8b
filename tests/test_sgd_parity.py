"""rule=None is torch.optim.SGD: the same bits, the same state dicts, the same errors."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from elropt import ELRSGD
from elropt import foreach as elr_foreach

SHAPES: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = [
    ((5, 7), lambda t: t),
    ((3,), lambda t: t),
    ((4, 6), lambda t: t.t()),
    ((2, 3, 3, 3), lambda t: t.contiguous(memory_format=torch.channels_last)),
    ((6, 8), lambda t: t[::2, ::3]),
    ((), lambda t: t),
    ((0, 4), lambda t: t),
]
HYPER = [
    {"momentum": μ, "dampening": d, "nesterov": n, "weight_decay": ω, "maximize": x}
    for μ, d, n, ω, x in itertools.product([0, 0.9], [0, 0.1], [False, True], [0, 0.01], [False, True])
    if not (n and (μ == 0 or d != 0))
]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(layout(torch.randn(shape).to(dtype))) for shape, layout in SHAPES]


def set_gradients(step: int, *parameter_lists: list[nn.Parameter]) -> None:
    """Equal gradients for all lists; at step 1 some are missing, and one joins at step 2."""
    for i, same in enumerate(zip(*parameter_lists, strict=True)):
        g = torch.randn(same[0].shape, generator=torch.Generator().manual_seed(100 * step + i))
        missing = (i == 1 and step < 2) or (i == 2 and step == 1)
        for p in same:
            p.grad = None if missing else torch.empty_like(p).copy_(g)


def assert_equal(a: list[nn.Parameter], b: list[nn.Parameter], message: object = "") -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"parameter {i} differs by {(x - y).abs().max()}: {message}"


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hyper", HYPER, ids=str)
def test_same_bits(hyper: dict[str, Any], dtype: torch.dtype, foreach: bool | None) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    a = ELRSGD(ours, lr=0.1, rule=None, foreach=foreach, **hyper)
    b = torch.optim.SGD(theirs, lr=0.1, foreach=foreach, **hyper)
    for step in range(5):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
        assert_equal(ours, theirs, hyper)


@pytest.mark.parametrize("hyper", HYPER[::5], ids=str)
def test_same_bits_in_pieces_and_over_many_groups(
    hyper: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elr_foreach, "PIECE", 8)
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a, b = (
        cls(
            [{"params": [p], "lr": 0.1 / (i + 1), "weight_decay": 0.01 * (i % 2)} for i, p in enumerate(ps)],
            **{**hyper, **options},
        )
        for cls, ps, options in (
            (ELRSGD, ours, {"rule": None}),
            (torch.optim.SGD, theirs, {"foreach": False}),
        )
    )
    for step in range(4):
        set_gradients(step, ours, theirs)
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] *= 0.9
        a.step()
        b.step()
        assert_equal(ours, theirs, hyper)


@pytest.mark.parametrize("foreach", [False, True, None])
def test_same_bits_where_a_neighbouring_group_has_its_first_gradient_later(foreach: bool | None) -> None:
    """In bfloat16 torch's foreach rounds otherwise where a buffer is missing: in that group, not in the other."""
    results = []
    for make in (partial(SGD, foreach=foreach), partial(ELRSGD, rule=None, foreach=foreach)):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(200).bfloat16()) for _ in range(2)]
        optimizer = make([{"params": [p]} for p in params], lr=0.1, momentum=0.9, weight_decay=0.01)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = torch.randn(200).bfloat16() if step >= i else None
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    assert all(map(torch.equal, *results))


def test_a_gradient_of_another_dtype_is_taken() -> None:
    p = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    p.grad_dtype = None
    p.grad = torch.full((3, 3), 0.5)
    ELRSGD([p], lr=0.5, rule=None).step()
    assert torch.equal(p.detach(), torch.full((3, 3), 0.75, dtype=torch.bfloat16))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("hyper", HYPER, ids=str)
def test_same_bits_where_gradients_have_another_dtype(hyper: dict[str, Any], foreach: bool) -> None:
    """`Tensor.grad_dtype`: bfloat16 gradients of float32 weights; SGD's buffers are float32 only with weight decay."""
    if foreach and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11's own foreach refuses such gradients")
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a = ELRSGD(ours, lr=0.1, rule=None, foreach=foreach, **hyper)
    b = torch.optim.SGD(theirs, lr=0.1, foreach=foreach, **hyper)
    for p in (*ours, *theirs):
        p.grad_dtype = None
    for step in range(4):
        set_gradients(step, ours, theirs)
        for p in (*ours, *theirs):
            p.grad = None if p.grad is None else p.grad.bfloat16()
        a.step()
        b.step()
        assert_equal(ours, theirs, hyper)
        for p, q in zip(ours, theirs, strict=True):
            held, expected = (o.state.get(t, {}).get("momentum_buffer") for o, t in ((a, p), (b, q)))
            assert (held is None) == (expected is None)
            if held is not None:
                assert held.dtype == expected.dtype
                assert torch.equal(held, expected)


@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_are_left_alone(foreach: bool) -> None:
    ours = parameters(torch.float32)
    set_gradients(0, ours)
    before = [None if p.grad is None else p.grad.clone() for p in ours]
    optimizer = ELRSGD(ours, lr=0.1, momentum=0.9, nesterov=True, rule=None, foreach=foreach)
    for _ in range(2):
        optimizer.step()
    for p, g in zip(ours, before, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or (p.grad is not None and torch.equal(p.grad, g))


@pytest.mark.parametrize("direction", ["from SGD", "to SGD"])
def test_state_dicts_are_exchangeable(direction: str) -> None:
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    ours_optimizer, theirs_optimizer = ELRSGD(ours, rule=None, **hyper), torch.optim.SGD(theirs, **hyper)
    first, second = (
        (theirs_optimizer, ours_optimizer) if direction == "from SGD" else (ours_optimizer, theirs_optimizer)
    )
    trained, other = (theirs, ours) if direction == "from SGD" else (ours, theirs)
    for step in range(3):
        set_gradients(step, trained)
        first.step()
    with torch.no_grad():
        for p, q in zip(other, trained, strict=True):
            p.copy_(q)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for group in (*first.param_groups, *second.param_groups):
        assert group["lr"] == 0.1
        assert group["momentum"] == 0.9
    for step in range(3, 6):
        set_gradients(step, ours, theirs)
        first.step()
        second.step()
        assert_equal(ours, theirs, direction)


def test_state_has_the_same_keys_as_sgd() -> None:
    for momentum in (0, 0.9):
        ours, theirs = parameters(torch.float32), parameters(torch.float32)
        a, b = ELRSGD(ours, rule=None, momentum=momentum), torch.optim.SGD(theirs, momentum=momentum)
        set_gradients(0, ours, theirs)
        a.step()
        b.step()
        mine, torchs = a.state_dict(), b.state_dict()
        assert {i: set(s) for i, s in mine["state"].items()} == {
            i: set(s) for i, s in torchs["state"].items()
        }
        assert set(torchs["param_groups"][0]) <= set(mine["param_groups"][0])


def test_signature_is_a_superset() -> None:
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (ELRSGD, torch.optim.SGD))
    for name, parameter in theirs.items():
        assert name in ours
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default
    positional = [n for n, p in theirs.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind == p.POSITIONAL_OR_KEYWORD] == positional


def test_closure_hooks_and_defaults() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = ELRSGD([p], lr=0.5, rule=None)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    assert torch.equal(p.detach(), torch.full((3, 3), 0.5))
    assert calls == ["pre", "closure", "post"]
    assert ELRSGD([p]).defaults["lr"] == torch.optim.SGD([p]).defaults["lr"] == 1e-3


@pytest.mark.parametrize("foreach", [False, True])
def test_sparse_gradients(foreach: bool) -> None:
    def embedding() -> nn.Embedding:
        torch.manual_seed(0)
        return nn.Embedding(10, 3, sparse=True)

    ours, theirs = embedding(), embedding()
    a, b = (
        ELRSGD(ours.parameters(), lr=0.1, rule=None, foreach=foreach),
        torch.optim.SGD(theirs.parameters(), lr=0.1),
    )
    for net, optimizer in ((ours, a), (theirs, b)):
        for index in ([1, 2, 2], [5]):
            optimizer.zero_grad()
            net(torch.tensor(index)).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("rule", [None, "warmup", "uniform"])
def test_complex_parameters_see_plain_sgd(rule: str | None, foreach: bool) -> None:
    torch.manual_seed(0)
    start, g = torch.randn(4, 4, dtype=torch.complex64), torch.randn(4, 4, dtype=torch.complex64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = ELRSGD([ours], lr=0.1, momentum=0.9, rule=rule, foreach=foreach)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(3):
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("foreach", [False, True])
def test_lr_as_a_tensor(foreach: bool) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    lr = torch.tensor([0.1])
    a = ELRSGD(ours, lr=lr, momentum=0.9, rule=None, foreach=foreach)
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for step in range(4):
        lr.fill_(0.1 / (step + 1))
        b.param_groups[0]["lr"] = 0.1 / (step + 1)
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_differentiable() -> None:
    def through_two_steps(cls: type[torch.optim.Optimizer], **kwargs: Any) -> Tensor:
        start = torch.tensor([1.0, 2.0], requires_grad=True)
        p = start.clone()
        p.retain_grad()
        optimizer = cls([p], lr=0.1, momentum=0.9, weight_decay=0.1, differentiable=True, **kwargs)
        for _ in range(2):
            p.grad = (p**2).detach() * start
            optimizer.step()
        p.sum().backward()
        assert start.grad is not None
        return start.grad

    assert torch.equal(through_two_steps(ELRSGD, rule=None), through_two_steps(torch.optim.SGD))
