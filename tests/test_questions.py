"""Questions change nothing: not the plan of the next step, not a report, not whether the warm-up is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from elropt import ELRSGD, effective_lrs, kernels, layer_stats
from elropt._rule_group import RuleGroupPlan
from elropt.rules import RULES

from .every_rule import needs
from .nets import backward, bn_mlp, train
from .test_contract import BACKENDS

PURE_CACHES = {"_cache"}  # each entry with the values that it was made of


def snapshot(root: object) -> dict[str, object]:
    """All that is reachable through attributes, dicts and lists: tensors and arrays by identity, version and bytes,
    other objects by identity or value."""
    found: dict[str, object] = {}
    seen: set[int] = set()

    def visit(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[name] = id(value), value.data_ptr(), value._version, data
            return
        if isinstance(value, int | float | str | bytes | type(None)):
            found[name] = value
            return
        found[name] = id(value)
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            found[name + "#"] = [k if isinstance(k, str | int | tuple | type(None)) else id(k) for k in value]
            for i, held in enumerate(value.values()):
                visit(f"{name}[{i}]", held)
        elif isinstance(value, list | tuple | set):
            found[name + "#"] = len(value)
            for i, held in enumerate(value):
                visit(f"{name}[{i}]", held)
        elif type(value).__module__.startswith("elropt"):
            for key, held in vars(value).items():
                if key not in PURE_CACHES:
                    visit(f"{name}.{key}", held)

    visit("optimizer", root)
    return found


def assert_changes_nothing(optimizer: ELRSGD, question: Callable[[], object]) -> None:
    before = snapshot(optimizer)
    answer = question()  # kept: its objects must not take the place of others
    after = snapshot(optimizer)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert not changed, (answer, sorted(changed))


def every_question(optimizer: ELRSGD) -> list[Callable[[], object]]:
    state = optimizer.state
    questions: list[Callable[[], object]] = [
        optimizer.layer_records,
        lambda: layer_stats(optimizer),
        lambda: effective_lrs(optimizer),
        lambda: optimizer._step_supports_amp_scaling,
        optimizer.state_dict,
    ]
    for rule_group in optimizer._rule_groups or []:
        questions += [
            lambda g=rule_group: g.plan(state),
            lambda g=rule_group: g.is_detached(state),
            lambda g=rule_group: g.record(state),
            lambda g=rule_group: g.measure_now(g.tensors(state)),
            rule_group.warmup_end.warmup_is_over,
        ]
    return questions


def replace_a_gradient(net: nn.Module, optimizer: ELRSGD) -> None:
    p = next(net.parameters())
    p.grad = None if p.grad is None else p.grad.clone()


def drop_a_gradient(net: nn.Module, optimizer: ELRSGD) -> None:
    next(net.parameters()).grad = None


def replace_a_buffer(net: nn.Module, optimizer: ELRSGD) -> None:
    p = next(net.parameters())
    optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)


def replace_the_memory(net: nn.Module, optimizer: ELRSGD) -> None:
    for held in optimizer.state.values():
        held.update({key: value.clone() for key, value in held.items()})


def change_the_rule(net: nn.Module, optimizer: ELRSGD) -> None:
    optimizer.param_groups[0]["rule"] = "angle"


def dampen(net: nn.Module, optimizer: ELRSGD) -> None:
    optimizer.param_groups[0]["dampening"] = 0.5


CHANGES: list[Callable[[nn.Module, ELRSGD], object]] = [
    lambda net, optimizer: None,
    replace_a_gradient,
    drop_a_gradient,
    replace_a_buffer,
    replace_the_memory,
    change_the_rule,
    dampen,
]


@pytest.mark.parametrize("rule", [None, "warmup", "uniform"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_questions_change_nothing(backend: str, rule: str | None) -> None:
    """Also after something that the next step will act on."""
    if backend == "triton" and not kernels.available():
        pytest.skip("needs triton")
    for change in CHANGES:
        net = bn_mlp(depth=1, width=4)
        optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, rule=rule, **BACKENDS[backend])
        train(net, optimizer, range(2))
        backward(net, 2)
        change(net, optimizer)
        for question in every_question(optimizer):
            assert_changes_nothing(optimizer, question)


def test_questions_before_the_first_step_change_nothing() -> None:
    net = bn_mlp(depth=1, width=4)
    optimizer = ELRSGD(net.parameters(), lr=0.05, tracked_lr=0.01)
    backward(net, 0)
    assert_changes_nothing(optimizer, lambda: layer_stats(optimizer))


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_can_be_made_anew_any_number_of_times(rule: str | None) -> None:
    """Steps that were planned, asked about and planned again are those that were only made."""
    results = []
    for asks in (False, True):
        net = bn_mlp(depth=2, width=4)
        optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, rule=rule, **needs(rule))
        for step in range(6):
            backward(net, step)
            if asks:
                for question in every_question(optimizer):
                    question()
            optimizer.step()
        state = [t for p in net.parameters() for t in optimizer.state[p].values()]
        results.append([t.detach() for t in (*net.parameters(), *state)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_does_not_change_its_plan(backend: str) -> None:
    """Not even the lists of momentum buffers, which are made in the first step."""
    if backend == "triton" and not kernels.available():
        pytest.skip("needs triton")

    def content(plan: RuleGroupPlan) -> list[object]:
        lists = [
            [list(map(id, field)) for field in group if isinstance(field, list)] for group in plan.groups
        ]
        return [plan.present, plan.triton_plan, lists]

    net = bn_mlp(depth=1, width=4)
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, **BACKENDS[backend])
    backward(net, 0)
    (rule_group,) = optimizer._update_rule_groups()
    with torch.no_grad():
        plan = rule_group.plan(optimizer.state)
        before = content(plan)
        assert rule_group.step(plan, optimizer.state, record=True)  # new buffers
    assert content(plan) == before
    assert all("momentum_buffer" in optimizer.state[p] for p in net.parameters())
