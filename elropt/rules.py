"""decide: from the sums over each layer to the factors of its update.

Vectors in, vectors out. Nothing here sees a weight tensor or reads a value back to the host, so every branch
on a measured value is a `torch.where`. A *row* is what one norm is taken over: a tensor, or with
granularity "filter" one index of its dimension 0. Derivations: docs/theory.md.

A rule is one function here and one entry in `RULES`, at the end; for the kernels it also is one function in
`kernels/decide.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RADIAL_TESTS = 8  # after which a layer counts as scale-invariant for good
TEST_TURN = 0.05  # λΓE, the share of the critical angle, at which the test of a step counts in full
LEAST_TEST = 0.01  # what the test of any other step counts
NEAR_ZERO = (0.02, 1e-4, 0.1)  # of |cos(w,g)|: below min(first/√n + second, third/√n) a test is passed
SMOOTHING = 0.9  # of c over the steps of the warm-up
EQUALIZATION_RATE = 0.1  # share of log(E/E★) that the warm-up rescales away per step
SHARE_CHANGE = 0.01  # of a layer's share of the radius of the whole network, below which it is left as it is
LEAST_TANGENT = 1e-5  # of ‖u‖² in its parts, below which ‖u⊥‖² may be rounding
LEAST_SHRINK = 0.1  # to which the radial part of one update may shrink a weight, with elr_of="update"
TINY = torch.finfo(torch.float32).tiny  # a squared norm below this, 1.2e-38, counts as zero
HUGE = torch.finfo(torch.float32).max
EQUALIZED_STD = 0.1  # root mean square of log(E/E★), from the smoothed c, below which the warm-up hands over
LR_RISE = 1.0001  # times the largest λΓ so far: above this the learning rate has risen, not only been rounded


class LayerStats(NamedTuple):
    """Sums over each row, [R] float32: ‖w‖², ‖g‖², ⟨w,g⟩, ⟨w,m⟩; for the length of the update also ‖m‖², ⟨g,m⟩."""

    weight_sq: Tensor
    grad_sq: Tensor
    weight_dot_grad: Tensor
    weight_dot_momentum: Tensor
    momentum_sq: Tensor | None = None
    grad_dot_momentum: Tensor | None = None


class LayerControls(NamedTuple):
    """What the update applies to each row, [R] float32; None stands for the identity."""

    grad_factor: Tensor | None = None  # s
    weight_factor: Tensor | None = None  # a
    radial: Tensor | None = None  # p_l
    lr_factor: Tensor | None = None  # f, of λ


class RuleState(NamedTuple):
    """What a rule remembers from step to step, float32. Zero means "not yet seen"."""

    sphere_grad_norm: Tensor  # [R] c = ‖g‖·‖w‖, smoothed over the steps of the warm-up
    radius: Tensor  # [R] ‖w‖ that a rule keeps
    tracked: Tensor  # [R] radial tests passed so far, 0 … RADIAL_TESTS, fractions too; -1 once one has failed
    handed_over: Tensor  # 0-dim: 1 while the warm-up has ended
    largest_lr: Tensor  # 0-dim: the largest λΓ of the steps at which the warm-up acted


ROW_STATE = ("sphere_grad_norm", "radius", "tracked")  # the fields of `RuleState` with an entry per row


class RowHyper(NamedTuple):
    """The param-group values that a rule needs, [R] float32.

    growth_gain: under steady gradients ‖w‖² grows by (lr·growth_gain·E)² a step; see `growth_gain`.
    """

    lr: Tensor
    weight_decay: Tensor
    growth_gain: Tensor
    update_per_grad: Tensor  # ∂u/∂g̃
    update_per_momentum: Tensor  # ∂u/∂m, m the buffer before the step
    numel: Tensor
    lr_ratio: Tensor | None = None  # of the λ of rows that are tracked to `lr`; None: 1
    settling: Tensor | None = None  # φ²/λ at the equilibrium of SGD, for "equilibrium" alone; see `settling`
    diffusion: Tensor | None = None  # with `protect`, see `diffusion`
    least_size: Tensor | None = None  # with `protect`: what counts as ‖w‖ at least


class UpdateParts(NamedTuple):
    """Of the update u, which is linear in g and m, without this step's decay, which is radial; [R]."""

    radial: Tensor  # ⟨w,u⟩/‖w‖²
    tangent_sq: Tensor  # ‖u⊥‖²
    update_sq: Tensor  # ‖u‖²
    has_tangent: (
        Tensor  # bool: ‖u⊥‖² is usable, and more than what rounding leaves of the sums that it is made of
    )


class RuleInputs(NamedTuple):
    """What a rule decides on. `hyper.lr` is the λ of each row, with its own ratio."""

    stats: LayerStats
    state: RuleState
    hyper: RowHyper
    directed: Tensor  # [R] bool: the rows that are tracked and whose ‖w‖ is usable
    moving: Tensor  # [R] bool: of these, the ones whose ‖g‖ is usable; for `decide_update`, whose ‖u⊥‖ is too
    whole: bool = False  # granularity "network": one norm over all rows
    absent: Tensor | None = None  # 0-dim bool: rows of earlier steps are missing; None: no
    update: UpdateParts | None = None  # for `decide_update`


def decide(
    rule: str | None,
    stats: LayerStats,
    state: RuleState,
    hyper: RowHyper,
    *,
    granularity: str = "layer",
    project: bool = False,
    of_update: bool = False,
    protect: bool = False,
    absent: Tensor | None = None,
    with_tests: bool = True,
) -> tuple[LayerControls, RuleState]:
    """The factors of this step and the state after it.

    `of_update` is ``elr_of="update"``: it needs all of `stats`. There ⟨w,g⟩ of a layer whose radial tests are over
    counts as 0, whether it was measured or not; that of a filter, which need not be invariant alone, is needed.
    `protect` has `hold_back` act on the rows that are not tracked, and needs all of `stats` too.
    `absent` (0-dim bool) says whether rows that took part in earlier steps are missing from these vectors, `with_tests`
    whether a row may have radial tests before it.

    Rows that cannot be judged (not tracked, ‖w‖ or ‖g‖ zero or not finite) have no influence on the others. They get
    the factors of plain SGD, except that a gradient too large for its norm (‖g‖² overflows) is left out, s = 0: that is
    the limit of s as E grows, and a step of such a length could never be made good. With `of_update` and a rule that
    sets an angle, a tracked row does not move at a step at which ‖g‖ or the tangential part of its update is of no use:
    momentum alone would turn it on by as much.
    """
    spec = RULES[rule]
    before = tracked = state.tracked
    if with_tests:
        tracked = radial_test(stats, before, hyper.numel)
    directed = (tracked > 0) & usable(stats.weight_sq)
    too_large = directed & torch.isinf(stats.grad_sq)
    state = state._replace(tracked=tracked)
    own_lr = lr_factor(tracked, hyper)
    if own_lr is not None:
        hyper = hyper._replace(lr=hyper.lr * own_lr)
    if of_update:
        if granularity != "filter":
            dot = torch.where(before < RADIAL_TESTS, stats.weight_dot_grad, 0.0)
            stats = stats._replace(weight_dot_grad=dot)
        stats = without_gradient(stats, too_large)
    parts = update_parts(stats, hyper) if of_update or protect else None
    if of_update:
        assert parts is not None
        assert spec.decide_update is not None
        moving = directed & usable(stats.grad_sq) & parts.has_tangent
        whole = granularity == "network"
        inputs = RuleInputs(stats, state, hyper, directed, moving, whole, absent, parts)
        controls, after = spec.decide_update(inputs)
        controls = controls._replace(grad_factor=torch.where(too_large, 0.0, 1.0))
    else:
        moving = directed & usable(stats.grad_sq)
        inputs = RuleInputs(stats, state, hyper, directed, moving, granularity == "network", absent)
        controls, after = spec.decide(inputs)
        if controls.grad_factor is not None:
            if spec.ends:
                too_large = too_large & (after.handed_over == 0)
            controls = controls._replace(grad_factor=torch.where(too_large, 0.0, controls.grad_factor))
            stats = stats._replace(weight_dot_grad=torch.where(too_large, 0.0, stats.weight_dot_grad))
    if with_tests:
        if of_update:
            assert parts is not None
            turn = update_turn(parts, stats, hyper, controls)
        elif spec.turns_alike:
            turn = common_turn(stats, hyper, moving)
        else:
            turn = step_turn(stats, hyper, controls)
        after = after._replace(tracked=count_test(before, tracked, turn))
    if project:
        radial = radial_coefficient(stats, hyper, controls.grad_factor, controls.weight_factor)
        controls = controls._replace(radial=torch.where(directed & torch.isfinite(radial), radial, 0.0))
    if protect:
        assert parts is not None
        held_back = hold_back(parts, stats, hyper, directed, tracked)
        f = held_back if controls.lr_factor is None else controls.lr_factor * held_back
        controls = controls._replace(lr_factor=f)
    if own_lr is not None:
        own_lr = own_lr if controls.lr_factor is None else own_lr * controls.lr_factor
        controls = controls._replace(lr_factor=own_lr)
    return controls, after


def lr_factor(tracked: Tensor, hyper: RowHyper) -> Tensor | None:
    """What the update multiplies λ by: the ratio of rows that are tracked, 1 elsewhere; None if there are no ratios."""
    return None if hyper.lr_ratio is None else torch.where(tracked > 0, hyper.lr_ratio, 1.0)


def plain(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """SGD: no factors."""
    return LayerControls(), inputs.state


def warmup(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """Equalize the ELRs without changing the network's function, then hand over to plain SGD.

    All layers have the elr λE★. E★ is the geometric mean of E or, if that is less, the critical one: where ‖w‖²
    doubles in a step under steady gradients, √((1-μ)³/(1+μ))/((1-d)·λ). Meanwhile each weight is rescaled a little at
    every step, by a = (E/E★)^(EQUALIZATION_RATE/2); as E ∝ 1/‖w‖², the E of all layers approach E★ and the factors of
    the gradients approach 1.

    Whether they have arrived is judged by E from a smoothed c, which neither the noise of one gradient nor a
    rescaled weight changes: once log E is within EQUALIZED_STD of log E★ (root mean square) and every layer has
    passed its radial tests, the rest of the rescaling is done in one step and the warm-up is over. A step at which
    some layer cannot be judged (no gradient though not frozen, a zero one, NaN) never ends it, nor one at which λΓ has
    risen (`lr_has_risen`). After the end, a λΓ that has risen starts it again, with a new average of c. Derived,
    docs/theory.md §9.
    """
    stats, state, hyper, moving = inputs.stats, inputs.state, inputs.hyper, inputs.moving
    lr_gain = hyper.lr * hyper.growth_gain
    critical = -torch.where(moving, lr_gain.log(), -math.inf).amax()
    log_e = log_relative_grad(stats, moving)
    offset = torch.where(moving, log_e - torch.minimum(masked_mean(log_e, moving), critical), 0.0)
    rises = lr_has_risen(state, lr_gain)
    restarts = rises & (state.handed_over != 0)
    active = rises | (state.handed_over == 0)
    before = torch.where(restarts, 0.0, state.sphere_grad_norm)
    c = torch.where(moving, smooth(before, stats.weight_sq.sqrt() * stats.grad_sq.sqrt()), before)
    log_e = torch.where(moving, c.log() - stats.weight_sq.log(), 0.0)
    smooth_offset = torch.where(moving, log_e - torch.minimum(masked_mean(log_e, moving), critical), 0.0)
    tested = state.tracked == RADIAL_TESTS
    ends = (
        moving.any()
        & ~rises
        & torch.where(moving, tested, state.tracked < 0).all()
        & (masked_mean(smooth_offset.square(), moving).sqrt() < EQUALIZED_STD)
    )
    if inputs.absent is not None:
        ends = ends & ~inputs.absent
    log_a = torch.where(tested, torch.where(ends, smooth_offset, EQUALIZATION_RATE * offset) / 2, 0.0)
    s, a = (torch.where(active, value, 0.0).exp() for value in (log_a - offset, log_a))
    # a host that learns of the end late leaves the same state
    after = state._replace(
        sphere_grad_norm=torch.where(active, c, state.sphere_grad_norm),
        handed_over=torch.where(active, ends.to(state.handed_over), state.handed_over),
        largest_lr=torch.where(active, largest_lr(state, lr_gain, moving), state.largest_lr),
    )
    return LayerControls(s, a), after


def lr_has_risen(state: RuleState, lr_gain: Tensor) -> Tensor:
    """Whether the λΓ of a layer that the warm-up has acted on is larger than at any step that it acted at; 0-dim bool.

    Args:
        state: of the rule.
        lr_gain: λΓ of each row.
    """
    return (took_part(state) & (lr_gain > LR_RISE * state.largest_lr)).any()


def largest_lr(state: RuleState, lr_gain: Tensor, moving: Tensor) -> Tensor:
    """The largest λΓ so far, with that of the rows that move, and of those that have moved before."""
    return torch.maximum(state.largest_lr, torch.where(moving | took_part(state), lr_gain, 0.0).amax())


def took_part(state: RuleState) -> Tensor:
    """Which rows the warm-up has acted on."""
    return (state.sphere_grad_norm > 0) & (state.tracked > 0)


def uniform(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """Every layer has the same ELR: s = Ē/E, Ē the geometric mean."""
    log_e = log_relative_grad(inputs.stats, inputs.moving)
    return LayerControls(grad_factor=uniform_factor(log_e, inputs.moving)), inputs.state


def angle(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """Every layer has the ELR `lr` and keeps its norm: the gradient at ŵ, g/a, is made as long as ŵ."""
    return on_sphere(inputs, lambda radius, weight_norm, grad_norm: radius / grad_norm)


def sphere(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """SGD on the unit sphere, norm kept: the gradient at ŵ, g/a, is multiplied by ‖ŵ‖²."""
    return on_sphere(inputs, lambda radius, weight_norm, grad_norm: radius * weight_norm)


def equilibrium(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """Every layer has the ELR that it would have at the equilibrium of SGD, √(2λω/S), and keeps its norm.

    S is what the coefficients of momentum add up to, 1/(1−μ): with independent gradients the update then turns a layer
    by the angle φ of that equilibrium. Derived, docs/theory.md §7."""
    per_lr = settling_angle(inputs.hyper) / inputs.hyper.lr
    per_lr = torch.where(inputs.hyper.lr > 0, per_lr, 0.0)
    return on_sphere(inputs, lambda radius, weight_norm, grad_norm: radius / grad_norm * per_lr)


def uniform_update(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """Every layer turns by the same angle: the geometric mean of those that it would turn by.

    The radial part of the update, the decay in it too, moves the norm as in SGD: a = 1 − λ·⟨w,u⟩/‖w‖².
    """
    stats, hyper, moving = inputs.stats, inputs.hyper, inputs.moving
    assert inputs.update is not None
    radial, tangent_sq, _, _ = inputs.update
    a = 1 - hyper.lr * (radial + hyper.update_per_grad * hyper.weight_decay)
    a = torch.where(moving, a.clamp(min=LEAST_SHRINK), 1.0)
    log_u = torch.where(moving, (tangent_sq.log() - stats.weight_sq.log()) / 2 - a.log(), 0.0)
    return controls_of_update(hyper, moving, radial, a, uniform_factor(log_u, moving)), inputs.state


def angle_update(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """Every layer turns by the angle λ and keeps its norm."""
    return turn_on_sphere(inputs, inputs.hyper.lr)


def equilibrium_update(inputs: RuleInputs) -> tuple[LayerControls, RuleState]:
    """Every layer turns by the angle of SGD's equilibrium, √(2λω/(1+μ)), and keeps its norm."""
    return turn_on_sphere(inputs, settling_angle(inputs.hyper))


def turn_on_sphere(inputs: RuleInputs, angle: Tensor) -> tuple[LayerControls, RuleState]:
    """w' = R·(cos φ·w/‖w‖ − sin φ·u⊥/‖u⊥‖) with φ = `angle` [R]: exactly this angle, and the norm R.

    With `inputs.whole` w and u are those of all rows together, and φ is the largest. Rows that do not move are brought
    back to their norm.
    """
    stats, hyper, directed, moving = inputs.stats, inputs.hyper, inputs.directed, inputs.moving
    kept = first_radius(inputs)
    assert inputs.update is not None
    radial, tangent_sq, update_sq, _ = inputs.update
    weight_norm, radius = stats.weight_sq.sqrt(), kept
    if inputs.whole:
        whole_sq = total(stats.weight_sq, moving)
        radial = total(radial * stats.weight_sq, moving) / whole_sq
        tangent_sq = (total(update_sq, moving) - radial.square() * whole_sq).clamp(min=0.0)
        weight_norm, radius = whole_sq.sqrt(), total(kept.square(), moving).sqrt()
        angle = torch.where(moving, angle, 0.0).amax()
        usable_whole = usable(whole_sq) & usable(tangent_sq) & torch.isfinite(radius)
        directed = moving = moving & usable_whole
    to_radius = torch.where(directed, radius / weight_norm, 1.0)
    a = torch.where(moving, angle.cos() * to_radius, to_radius)
    per_lr = torch.where(hyper.lr > 0, angle.sin() / hyper.lr, 0.0)
    rests = inputs.directed & ~inputs.moving
    f = torch.where(moving, radius / tangent_sq.sqrt() * per_lr, torch.where(rests, 0.0, 1.0))
    if inputs.whole:
        kept = renewed_shares(kept, to_radius * stats.weight_sq.sqrt(), directed)
    return controls_of_update(hyper, moving, radial, a, f), inputs.state._replace(radius=kept)


def controls_of_update(
    hyper: RowHyper, moving: Tensor, radial: Tensor, a: Tensor, f: Tensor
) -> LayerControls:
    """w' = a·w − λf·u⊥, where `radial` is ⟨w,u⟩/‖w‖² without this step's decay, which the update takes of a·w."""
    p = torch.where(moving, radial / a + hyper.update_per_grad * hyper.weight_decay, 0.0)
    return LayerControls(weight_factor=a, radial=p, lr_factor=f)


def update_parts(stats: LayerStats, hyper: RowHyper) -> UpdateParts:
    """From the sums alone. Derived, docs/theory.md §9."""
    assert stats.momentum_sq is not None
    assert stats.grad_dot_momentum is not None
    of_g, of_m = hyper.update_per_grad, hyper.update_per_momentum
    dot = of_g * stats.weight_dot_grad + of_m * stats.weight_dot_momentum
    radial = dot / stats.weight_sq
    grad_sq, momentum_sq = of_g.square() * stats.grad_sq, of_m.square() * stats.momentum_sq
    update_sq = grad_sq + 2 * of_g * of_m * stats.grad_dot_momentum + momentum_sq
    tangent_sq = (update_sq - radial * dot).clamp(min=0.0)
    parts_sq = grad_sq + momentum_sq
    has_tangent = usable(tangent_sq) & (tangent_sq > LEAST_TANGENT * parts_sq) & torch.isfinite(parts_sq)
    return UpdateParts(radial, tangent_sq, update_sq, has_tangent)


def without_gradient(stats: LayerStats, left_out: Tensor) -> LayerStats:
    """The sums with g = 0 in the rows `left_out`."""
    of_gradient = "grad_sq", "weight_dot_grad", "grad_dot_momentum"
    return stats._replace(**{name: torch.where(left_out, 0.0, getattr(stats, name)) for name in of_gradient})


def update_turn(parts: UpdateParts, stats: LayerStats, hyper: RowHyper, controls: LayerControls) -> Tensor:
    """λf·‖u⊥‖/(a·‖w‖): the tangent of the angle that a row turns by, of `decide_update`'s factors."""
    assert controls.lr_factor is not None
    assert controls.weight_factor is not None
    length = hyper.lr * controls.lr_factor * parts.tangent_sq.sqrt()
    return length / (controls.weight_factor * stats.weight_sq.sqrt())


def settling_angle(hyper: RowHyper) -> Tensor:
    """√(settling·λ), the angle of "equilibrium", in radians."""
    assert hyper.settling is not None
    return (hyper.settling * hyper.lr).sqrt()


def hold_back(
    parts: UpdateParts, stats: LayerStats, hyper: RowHyper, directed: Tensor, tracked: Tensor
) -> Tensor:
    """f ≤ 1 of rows that are not tracked, 1 elsewhere: beside layers that turn by φ no other parameter moves further,
    in relation to its size, than φ·`diffusion`.

    The size is ‖w‖ or `least_size`, whichever is larger; φ is the largest of a layer at this step. What moves less than
    that is plain SGD, and so is everything at a step without a tracked layer. Found by measurement, docs/results.
    """
    assert hyper.diffusion is not None
    assert hyper.least_size is not None
    assert stats.momentum_sq is not None
    angle = torch.where(directed, settling_angle(hyper), 0.0).amax()
    size = torch.maximum(stats.weight_sq.sqrt(), hyper.least_size)
    too_long = torch.isinf(stats.grad_sq) | torch.isinf(stats.momentum_sq)
    length = hyper.lr * torch.where(too_long, math.inf, parts.update_sq).sqrt()
    f = angle * hyper.diffusion * size / length
    holds = (tracked <= 0) & (angle > 0) & (f < 1)
    return torch.where(holds, f, 1.0)


def settling(momentum: float, dampening: float, nesterov: bool, *, of_update: bool) -> float:
    """φ²/(λω) at the equilibrium of SGD with weight decay, φ the angle that the update turns a weight by: 2Q/S, with S
    and Q the sums of the coefficients that momentum gives to successive gradients, and of their squares. Without
    Nesterov momentum 2·(1−d)/(1+μ). For independent gradients, without Nesterov momentum for all. Not `of_update`: 2/S,
    the square of the ELR of plain SGD steps that turn it so. Derived, docs/theory.md §7."""
    of_all, squares = momentum_sums(momentum, dampening, nesterov)
    return 2 * (squares if of_update else 1.0) / of_all


def diffusion(momentum: float, dampening: float, nesterov: bool, *, of_update: bool) -> float:
    """√Q/S, with S and Q as for `settling`, √((1−μ)/(1+μ)) without Nesterov momentum: updates of this length, made by
    momentum of independent gradients, lead as far in the long run as independent steps of length 1. Not `of_update`:
    Q/S, where the length 1 is that of plain SGD steps. Derived, docs/theory.md §9."""
    of_all, squares = momentum_sums(momentum, dampening, nesterov)
    return (math.sqrt(squares) if of_update else squares) / of_all


def momentum_sums(momentum: float, dampening: float, nesterov: bool) -> tuple[float, float]:
    """S and Q: of the coefficients that an update gives to the gradients of all steps before, and of their squares."""
    μ, k = momentum, 1 - dampening if momentum else 1.0
    if μ >= 1:
        return math.inf, math.inf
    squares = (1 + μ) ** 2 + μ**4 / (1 - μ**2) if nesterov else k**2 / (1 - μ**2)
    return k / (1 - μ), squares


def on_sphere(
    inputs: RuleInputs, grad_factor: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[LayerControls, RuleState]:
    """Back to the sphere, ŵ = a·w with a = radius/‖w‖, then a step on it, s = `grad_factor`(radius, ‖w‖, ‖g‖).

    The radius is the norm that a row had when it first had a direction. With `inputs.whole` the sphere is that of all
    rows together, and `radius` in the memory holds their shares of its radius. They are renewed only when one has
    changed by SHARE_CHANGE: each time rounds, and the radius would drift away over many small steps.
    """
    stats, directed, moving = inputs.stats, inputs.directed, inputs.moving
    kept = first_radius(inputs)
    weight_norm, grad_norm, radius = stats.weight_sq.sqrt(), stats.grad_sq.sqrt(), kept
    if inputs.whole:
        weight_norm, grad_norm, radius = (
            total(norm.square(), moving).sqrt() for norm in (weight_norm, grad_norm, radius)
        )
        moving = moving & torch.isfinite(weight_norm) & torch.isfinite(grad_norm) & torch.isfinite(radius)
        directed = moving
    a = torch.where(directed, radius / weight_norm, 1.0)
    s = torch.where(moving, grad_factor(radius, weight_norm, grad_norm), 1.0)
    if inputs.whole:
        kept = renewed_shares(kept, a * stats.weight_sq.sqrt(), directed)
    return LayerControls(grad_factor=s, weight_factor=a), inputs.state._replace(radius=kept)


def first_radius(inputs: RuleInputs) -> Tensor:
    """The norm that each row had when it first had a direction."""
    kept = inputs.state.radius
    return torch.where((kept == 0) & inputs.directed, inputs.stats.weight_sq.sqrt(), kept)


def total(values: Tensor, ok: Tensor) -> Tensor:
    """The sum over the rows that count, for every row."""
    return torch.where(ok, values, 0.0).sum().expand_as(values)


def renewed_shares(kept: Tensor, share: Tensor, directed: Tensor) -> Tensor:
    """The rows' shares of the radius of them all, as they are now if one has changed by SHARE_CHANGE."""
    changed = (directed & ((share - kept).abs() > SHARE_CHANGE * kept)).any()
    return torch.where(directed & changed, share, kept)


def log_relative_grad(stats: LayerStats, moving: Tensor) -> Tensor:
    """log E of the rows that move, 0 elsewhere."""
    return torch.where(moving, (stats.grad_sq.log() - stats.weight_sq.log()) / 2, 0.0)


def radial_test(stats: LayerStats, passed: Tensor, numel: Tensor) -> Tensor:
    """The tests passed, once this step's ⟨w,g⟩ has been tested: it is zero for a scale-invariant weight (Euler).

    The cosine of two unrelated vectors of n entries is of order 1/√n. Rounding, also of half precision, averages out
    over the entries and stays far below that; the ε of the normalization leaves about ε/σ² of it, or more if the
    samples of a batch agree. So a row passes with |cos| < min(0.02/√n + 1e-4, 0.1/√n), which an unrelated gradient
    does with a probability of at most 8 %, and 8 times in a row with one of 2e-9, however large n is. A row is tracked
    while it has passed every test, until these have added up to RADIAL_TESTS; see `count_test`. Derived,
    docs/theory.md §9.
    """
    cosine = stats.weight_dot_grad / (stats.weight_sq.sqrt() * stats.grad_sq.sqrt())
    by_size, constant, at_most = NEAR_ZERO
    chance = 1 / numel.sqrt()
    zero = cosine.abs() < torch.minimum(by_size * chance + constant, at_most * chance)
    judged = usable(stats.weight_sq) & usable(stats.grad_sq) & torch.isfinite(cosine)
    testing = judged & (passed >= 0) & (passed < RADIAL_TESTS)
    return torch.where(testing, torch.where(zero, passed + LEAST_TEST, -1.0), passed)


def count_test(before: Tensor, passed: Tensor, turn: Tensor) -> Tensor:
    """What a test that was passed adds to those of `before`: up to 1, in proportion to the angle `turn` of the step.

    A weight that is invariant only jointly with a bias has ⟨w,g⟩ = -⟨b,∂b⟩, which is 0 as long as the bias is 0, as at
    many initializations. It shows only once the step sizes have let the bias move: about as far as the weight turns.
    """
    share = turn / TEST_TURN
    counted = before + torch.where(share < 1, share.clamp(min=LEAST_TEST), 1.0)
    return torch.where((passed > 0) & (passed != before), counted.clamp(max=RADIAL_TESTS), passed)


def step_turn(stats: LayerStats, hyper: RowHyper, controls: LayerControls) -> Tensor:
    """λΓ·s·E/a: about the angle that steady gradients turn a row by in a step, by the rule's factors."""
    s = 1.0 if controls.grad_factor is None else controls.grad_factor
    a = 1.0 if controls.weight_factor is None else controls.weight_factor
    return hyper.lr * hyper.growth_gain * s * stats.grad_sq.sqrt() / stats.weight_sq.sqrt() / a


def common_turn(stats: LayerStats, hyper: RowHyper, moving: Tensor) -> Tensor:
    """min(λΓĒ, 1): the `step_turn` that "warmup" gives to all rows; the largest λΓ counts, as in its cap."""
    largest = torch.where(moving, hyper.lr * hyper.growth_gain, 0.0).amax()
    return (largest * masked_mean(log_relative_grad(stats, moving), moving).exp()).clamp(max=1.0)


def usable(square: Tensor) -> Tensor:
    """Where a squared norm is finite and does not count as zero."""
    return square.clamp(TINY, HUGE) == square


def smooth(average: Tensor, value: Tensor) -> Tensor:
    """Exponential moving average that starts at the first value."""
    return torch.where(average == 0, value, torch.lerp(value, average, SMOOTHING))


def growth_gain(momentum: float, dampening: float = 0.0, nesterov: bool = False) -> float:
    """(1-d)·√((1+μ)/(1-μ)³), with Nesterov momentum √((1-μ+2μ²)/(1-μ)³): under steady gradients ‖w‖² grows by
    (lr·gain·E)² a step, to leading order. Derived, docs/theory.md §6 and §9."""
    μ = momentum
    growth = 1 - μ + 2 * μ**2 if nesterov else 1 + μ
    return abs(1 - dampening) * math.sqrt(growth / (1 - μ) ** 3) if μ < 1 else math.inf


def masked_mean(values: Tensor, ok: Tensor) -> Tensor:
    """Mean over the rows that count; 0 if none does."""
    return torch.where(ok, values, 0.0).sum() / ok.sum().clamp(min=1)


def uniform_factor(log_e: Tensor, ok: Tensor) -> Tensor:
    """s = Ē/E with Ē the geometric mean over the rows that count; 1 elsewhere."""
    return torch.where(ok, (masked_mean(log_e, ok) - log_e).exp(), 1.0)


def radial_coefficient(stats: LayerStats, hyper: RowHyper, s: Tensor | None, a: Tensor | None) -> Tensor:
    """p_l = ⟨ŵ,u⟩/‖ŵ‖², from the sums alone: u is linear in g, m and ŵ = a·w.  Derived, docs/theory.md §9."""
    s = torch.ones_like(stats.weight_sq) if s is None else s
    a = torch.ones_like(stats.weight_sq) if a is None else a
    radial_grad = s * stats.weight_dot_grad / (a * stats.weight_sq) + hyper.weight_decay
    radial_momentum = stats.weight_dot_momentum / (a * stats.weight_sq)
    return hyper.update_per_grad * radial_grad + hyper.update_per_momentum * radial_momentum


class RuleSpec(NamedTuple):
    """A rule, and all that others ask of it.

    Attributes:
        decide: the factors of a step and the memory after it.
        granularities: the values of `granularity` that it has a meaning for.
        lr_unit: what the learning rate of tracked layers is: SGD's "lr"; "rad per step", the angle of a plain SGD step;
            "sphere_lr", that of SGD on the unit sphere.
        scales_weights: it sets `weight_factor`.
        keeps_radius: it brings each weight back to the norm that it had at first, `RuleState.radius`.
        compares_layers: what it does to a layer depends on the others, at every granularity.
        turns_alike: all rows that move have the same elr, see `common_turn`.
        elr_of: what ``elr_of=None`` stands for.
        settles: it needs a weight decay, and `RowHyper.settling`.
        ends: it hands over to plain SGD: `RuleState.handed_over` becomes 1.
        decide_update: `decide` with ``elr_of="update"``; None: there is no such form.
    """

    decide: Callable[[RuleInputs], tuple[LayerControls, RuleState]]
    granularities: tuple[str, ...] = ("layer",)
    lr_unit: Literal["lr", "rad per step", "sphere_lr"] = "lr"
    scales_weights: bool = False
    keeps_radius: bool = False
    compares_layers: bool = False
    turns_alike: bool = False
    elr_of: Literal["gradient", "update"] = "gradient"
    settles: bool = False
    ends: bool = False
    decide_update: Callable[[RuleInputs], tuple[LayerControls, RuleState]] | None = None


RULES: dict[str | None, RuleSpec] = {
    None: RuleSpec(plain),
    "warmup": RuleSpec(warmup, scales_weights=True, compares_layers=True, turns_alike=True, ends=True),
    "uniform": RuleSpec(uniform, ("layer", "filter"), compares_layers=True, decide_update=uniform_update),
    "angle": RuleSpec(
        angle,
        ("layer", "network", "filter"),
        "rad per step",
        scales_weights=True,
        keeps_radius=True,
        decide_update=angle_update,
    ),
    "equilibrium": RuleSpec(
        equilibrium,
        ("layer", "network", "filter"),
        scales_weights=True,
        keeps_radius=True,
        elr_of="update",
        settles=True,
        decide_update=equilibrium_update,
    ),
    "sphere": RuleSpec(
        sphere, ("layer", "network", "filter"), "sphere_lr", scales_weights=True, keeps_radius=True
    ),
}
