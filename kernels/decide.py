"""From the sums over each layer to the factors of its update: `elropt.rules.decide`, in one program.

A rule is one @jit function, named as in `elropt.rules`. It goes over the rows, ROWS_PER_PASS at a time, as often as it
must, and hands each block with its factors to `finish_rows`. `RULES` has those of the package; one more is registered
with ``RULES[name] = function``. `UPDATE_RULES` has those for ``elr_of="update"``, which have functions of their own to
load rows and to finish them.

Flags are integers: that is what the interpreter makes of a comparison when it broadcasts it (see `only_if`). Sums over
the rows are float32, lane by lane and then as a tree.
"""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tables import of_group, only_if

__all__ = [
    "ROWS_PER_PASS",
    "RULES",
    "UPDATE_RULES",
    "Block",
    "RuleInputs",
    "decide",
    "finish_rows",
    "load_rows",
    "log_relative_grad",
    "memory_of",
]

ROWS_PER_PASS = tl.constexpr(256)

# As in elropt.rules, where they are explained.
RADIAL_TESTS = tl.constexpr(8)
TEST_TURN = tl.constexpr(0.05)
LEAST_TEST = tl.constexpr(0.01)
NEAR_ZERO_BY_SIZE, NEAR_ZERO, NEAR_ZERO_AT_MOST = tl.constexpr(0.02), tl.constexpr(1e-4), tl.constexpr(0.1)
SMOOTHING = tl.constexpr(0.9)
EQUALIZATION_RATE = tl.constexpr(0.1)
EQUALIZED_STD = tl.constexpr(0.1)
LR_RISE = tl.constexpr(1.0001)
SHARE_CHANGE = tl.constexpr(0.01)
LEAST_TANGENT = tl.constexpr(1e-5)
LEAST_SHRINK = tl.constexpr(0.1)
TINY = tl.constexpr(2.0**-126)  # sqrt and log take smaller ones for 0 on a GPU
INFINITY = tl.constexpr(float("inf"))


class RuleInputs(NamedTuple):
    """What the rules read and write: pointers to one entry per row, unless it says otherwise.

    weight_sq, grad_sq (−1: no gradient at this step), weight_dot_grad, weight_dot_momentum, momentum_sq,
    grad_dot_momentum (these two for ``elr_of="update"``), is_new (of the buffer, with dampening): sums. c, radius,
    tracked: the memory of the rule. handed_over: a pointer to one flag, and the largest λΓ behind it; None where the
    rule does not end. s, a, p, lr, f: the controls. lrs, hypers: by param group, see `of_group`. skipped: whether
    nothing may be remembered, since `found_inf` is set. n_rows: how many rows there are.
    """

    weight_sq: Any
    grad_sq: Any
    weight_dot_grad: Any
    weight_dot_momentum: Any
    momentum_sq: Any
    grad_dot_momentum: Any
    is_new: Any
    c: Any
    radius: Any
    tracked: Any
    handed_over: Any
    s: Any
    a: Any
    p: Any
    lr: Any
    f: Any
    numel: Any
    group_of_row: Any
    least_size: Any
    lrs: Any
    hypers: Any
    skipped: Any
    n_rows: Any


class Memory(NamedTuple):
    """What a rule remembers of each row: pointers to float32 [R], see `elropt.rules.RuleState`."""

    c: Any
    radius: Any
    tracked: Any


class Block(NamedTuple):
    """Rows that are decided at the same time: `at`, as far as they `exist`.

    ww, gg, wg: ‖w‖², ‖g‖², ⟨w,g⟩. c, radius: of the memory. passed: the radial tests passed after this step. directed:
    whether w is tracked and has a direction; moving: whether its gradient has one too.
    """

    at: Any
    exist: Any
    ww: Any
    gg: Any
    wg: Any
    c: Any
    radius: Any
    passed: Any
    directed: Any
    moving: Any


class UpdateBlock(NamedTuple):
    """A `Block` with what is known of the update u, without this step's decay.

    radial: ⟨w,u⟩/‖w‖². tangent_sq, update_sq: ‖u⊥‖², ‖u‖². too_large: whether the gradient is left out. moving: whether
    w has a direction, and u⊥ too.
    """

    at: Any
    exist: Any
    ww: Any
    radius: Any
    passed: Any
    directed: Any
    moving: Any
    radial: Any
    tangent_sq: Any
    update_sq: Any
    too_large: Any


@triton.jit
def decide(
    sums, rows, lrs, hypers, found_inf, n_rows, RULE: tl.constexpr, WHOLE: tl.constexpr, PROJECT: tl.constexpr
):
    """The controls of this step, and the memory after it.

    sums: see `args.Scratch`. rows, hypers: see `args`. found_inf: where given and not 0, nothing is remembered.
    RULE: a function of `RULES` or `UPDATE_RULES`. WHOLE: granularity "network". PROJECT: whether p is needed, or for
    `UPDATE_RULES`, which always need it, whether ⟨w,g⟩ counts even after the radial tests.
    Controls that the rule does not need are not written. Source: `elropt.rules`, docs/theory.md §9.
    """
    skipped = 0
    if found_inf is not None:
        skipped = (tl.load(found_inf) != 0).to(tl.int32)
    memory = memory_of(rows, n_rows)
    inputs = RuleInputs(
        weight_sq=sums,
        grad_sq=sums + n_rows,
        weight_dot_grad=sums + 2 * n_rows,
        weight_dot_momentum=sums + 3 * n_rows,
        momentum_sq=sums + 4 * n_rows,
        grad_dot_momentum=sums + 5 * n_rows,
        is_new=sums + 6 * n_rows,
        c=memory.c,
        radius=memory.radius,
        tracked=memory.tracked,
        handed_over=rows.handed_over,
        s=rows.controls,
        a=rows.controls + n_rows,
        p=rows.controls + 2 * n_rows,
        lr=rows.controls + 3 * n_rows,
        f=rows.controls + 4 * n_rows,
        numel=rows.numel,
        group_of_row=rows.group_of_row,
        least_size=rows.least_size,
        lrs=lrs,
        hypers=hypers,
        skipped=skipped,
        n_rows=n_rows,
    )
    RULE(inputs, WHOLE, PROJECT)


@triton.jit
def plain(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """SGD, whose layers are tested all the same."""
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        finish_rows(inputs, load_rows(inputs, start), None, None, None, 0, PROJECT)


@triton.jit
def warmup(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """All that move have the elr λE★ while a = (E/E★)^(EQUALIZATION_RATE/2), until log E from the smoothed c is within
    EQUALIZED_STD of log E★ (root mean square); again when λΓ has risen, from the next step on where the gradients have
    not been read at this one."""
    # read by all threads before the sums, which they wait for, and written by one after them
    over = (tl.load(inputs.handed_over) != 0).to(tl.int32)
    largest = tl.load(inputs.handed_over + 1)
    zero = tl.zeros([ROWS_PER_PASS], tl.float32)
    count, log_e_sum, smooth_sum, veto = zero, zero, zero, zero
    top, top_before = zero - INFINITY, zero - INFINITY
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_rows(inputs, start)
        count += row.moving.to(tl.float32)
        log_gain = log_lr(inputs, row)
        took_part = (row.c > 0) & (row.passed > 0) & (row.gg != -1.0)
        top = tl.maximum(top, tl.where(row.moving, log_gain, -INFINITY))
        top_before = tl.maximum(top_before, tl.where(took_part, log_gain, -INFINITY))
        log_e_sum += log_relative_grad(row)
        smooth_sum += log_smooth_relative_grad(row)
        waiting = tl.where(row.moving, row.passed != RADIAL_TESTS, row.passed >= 0)
        # rows without a gradient have not been judged: they matter only if they have had one before
        waiting = tl.where(row.gg == -1.0, row.c > 0, waiting)
        veto = tl.maximum(veto, (waiting & row.exist).to(tl.float32))
    n_moving = tl.sum(count)
    critical = -tl.max(top)
    log_target = tl.minimum(tl.sum(log_e_sum) / tl.maximum(n_moving, 1.0), critical)
    smooth_target = tl.minimum(tl.sum(smooth_sum) / tl.maximum(n_moving, 1.0), critical)
    rises = (tl.exp(tl.max(top_before)) > largest * LR_RISE).to(tl.int32)
    largest_now = tl.exp(tl.max(tl.maximum(top, top_before)))
    restarts = over & rises
    over = over - restarts

    squares = zero
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_rows(inputs, start)
        offset = tl.where(row.moving, log_smooth_relative_grad(row) - smooth_target, 0.0)
        squares += offset * offset
    is_equalized = tl.sqrt(tl.sum(squares) / tl.maximum(n_moving, 1.0)) < EQUALIZED_STD
    ends = ((n_moving > 0) & (tl.max(veto) == 0) & is_equalized & (rises == 0)).to(tl.int32)
    if (over == 0) & (inputs.skipped == 0):
        tl.store(inputs.handed_over, ends.to(tl.float32))
        tl.store(inputs.handed_over + 1, tl.maximum(largest, largest_now))

    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_rows(inputs, start)
        offset = tl.where(row.moving, log_relative_grad(row) - log_target, 0.0)
        smooth_offset = tl.where(row.moving, log_smooth_relative_grad(row) - smooth_target, 0.0)
        log_a = tl.where(ends != 0, smooth_offset, EQUALIZATION_RATE * offset) / 2
        log_a = tl.where(only_if(over == 0, row.passed == RADIAL_TESTS), log_a, 0.0)
        s = tl.exp(tl.where(over != 0, 0.0, log_a - offset))
        c = tl.where(only_if(restarts != 0, row.moving), sphere_grad_norm(row), smooth_c(row))
        c = tl.where(row.moving, c, 0.0)
        remembers = only_if((over == 0) & (inputs.skipped == 0), row.moving)
        forgets = only_if((restarts != 0) & (inputs.skipped == 0), row.exist & (row.gg != -1.0))
        tl.store(inputs.c + row.at, c, mask=remembers | forgets)
        turn = tl.exp(log_target - critical)
        finish_rows(inputs, row, s, tl.exp(log_a), turn, over, PROJECT)


@triton.jit
def uniform(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """s = Ē/E with Ē the geometric mean over the rows that move."""
    count = tl.zeros([ROWS_PER_PASS], tl.float32)
    log_e_sum = count
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_rows(inputs, start)
        count += row.moving.to(tl.float32)
        log_e_sum += log_relative_grad(row)
    log_mean = tl.sum(log_e_sum) / tl.maximum(tl.sum(count), 1.0)
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_rows(inputs, start)
        s = tl.where(row.moving, tl.exp(log_mean - log_relative_grad(row)), 1.0)
        finish_rows(inputs, row, s, None, None, 0, PROJECT)


@triton.jit
def angle(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """A step as long as ŵ = a·w, from the sphere that w began on."""
    on_sphere(inputs, WHOLE, PROJECT, True, False)


@triton.jit
def equilibrium(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """As `angle`, with the angle √(settling·λ) in the place of λ."""
    on_sphere(inputs, WHOLE, PROJECT, True, True)


@triton.jit
def sphere(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """A step of SGD on the unit sphere: ‖ŵ‖² times that of SGD at ŵ = a·w."""
    on_sphere(inputs, WHOLE, PROJECT, False, False)


@triton.jit
def on_sphere(
    inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr, IS_ANGLE: tl.constexpr, SETTLES: tl.constexpr
):
    """Back to the sphere (a = radius/‖w‖), then a step on it. With WHOLE the sphere is that of all rows together."""
    whole_norm, whole_grad_norm, whole_sphere = 1.0, 1.0, 1.0
    fits, renewed = 1, 0
    if WHOLE:
        ww_sum = tl.zeros([ROWS_PER_PASS], tl.float32)
        gg_sum, sphere_sum = ww_sum, ww_sum
        for start in range(0, inputs.n_rows, ROWS_PER_PASS):
            row = load_rows(inputs, start)
            _, radius = norm_and_radius(row)
            ww_sum += tl.where(row.moving, row.ww, 0.0)
            gg_sum += tl.where(row.moving, row.gg, 0.0)
            sphere_sum += tl.where(row.moving, radius * radius, 0.0)
        w_sq, g_sq, sphere_sq = tl.sum(ww_sum), tl.sum(gg_sum), tl.sum(sphere_sum)
        fits = ((w_sq > 0) & (w_sq < INFINITY) & (g_sq < INFINITY) & (sphere_sq < INFINITY)).to(tl.int32)
        whole_norm = tl.sqrt(tl.where(fits != 0, w_sq, 1.0))
        whole_grad_norm = tl.sqrt(tl.where(fits != 0, g_sq, 1.0))
        whole_sphere = tl.sqrt(tl.where(fits != 0, sphere_sq, 1.0))
        changed = tl.zeros([ROWS_PER_PASS], tl.int32)
        for start in range(0, inputs.n_rows, ROWS_PER_PASS):
            row = load_rows(inputs, start)
            norm, radius = norm_and_radius(row)
            by = tl.abs(whole_sphere / whole_norm * norm - radius)
            changed = changed | (row.moving & (by > radius * SHARE_CHANGE)).to(tl.int32)
        renewed = tl.max(changed)

    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_rows(inputs, start)
        norm, radius = norm_and_radius(row)
        grad_norm = tl.sqrt(tl.where(row.moving, row.gg, 1.0))
        sphere_norm, kept, moving = radius, row.directed, row.moving
        if WHOLE:
            moving = only_if(fits != 0, moving)
            kept = moving
            radius = tl.where(only_if(renewed != 0, kept), whole_sphere / whole_norm * norm, radius)
            zero = tl.zeros([ROWS_PER_PASS], tl.float32)
            sphere_norm, norm, grad_norm = whole_sphere + zero, whole_norm + zero, whole_grad_norm + zero
        a = tl.where(kept, sphere_norm / norm, 1.0)
        s = sphere_norm / grad_norm if IS_ANGLE else sphere_norm * norm
        if SETTLES:
            group = group_of(inputs, row)
            lr = of_group(group, inputs.lrs)
            s *= per_lr(settling_angle(inputs, group, lr), lr)
        s = tl.where(moving, s, 1.0)
        tl.store(inputs.radius + row.at, radius, mask=only_if(inputs.skipped == 0, row.exist))
        finish_rows(inputs, row, s, a, None, 0, PROJECT)


@triton.jit
def uniform_update(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """All that move turn by the geometric mean of their angles; the norm moves as in SGD."""
    count = tl.zeros([ROWS_PER_PASS], tl.float32)
    log_u_sum = count
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_updates(inputs, start, PROJECT)
        count += row.moving.to(tl.float32)
        log_u_sum += log_turn(row, radial_step(inputs, row))
    log_mean = tl.sum(log_u_sum) / tl.maximum(tl.sum(count), 1.0)
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_updates(inputs, start, PROJECT)
        a = radial_step(inputs, row)
        f = tl.where(row.moving, tl.exp(log_mean - log_turn(row, a)), 1.0)
        finish_updates(inputs, row, row.moving, row.radial, a, f)


@triton.jit
def angle_update(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """All turn by the angle λ and keep their norm."""
    turn_on_sphere(inputs, WHOLE, PROJECT, False)


@triton.jit
def equilibrium_update(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr):
    """All turn by the angle √(settling·λ) and keep their norm."""
    turn_on_sphere(inputs, WHOLE, PROJECT, True)


@triton.jit
def turn_on_sphere(inputs, WHOLE: tl.constexpr, PROJECT: tl.constexpr, SETTLES: tl.constexpr):
    """w' = R·(cos φ·w/‖w‖ − sin φ·u⊥/‖u⊥‖), R the radius and φ the angle. With WHOLE all rows are one, and turn by the
    largest φ."""
    zero = tl.zeros([ROWS_PER_PASS], tl.float32)
    to_radius, radius_per_tangent, whole_radial, whole_turn = 1.0, 1.0, 0.0, 0.0
    fits, renewed = 1, 0
    if WHOLE:
        ww_sum, uu_sum, dot_sum, sphere_sum, top = zero, zero, zero, zero, zero
        for start in range(0, inputs.n_rows, ROWS_PER_PASS):
            row = load_updates(inputs, start, PROJECT)
            _, radius = norm_and_radius(row)
            ww_sum += tl.where(row.moving, row.ww, 0.0)
            uu_sum += tl.where(row.moving, row.update_sq, 0.0)
            dot_sum += tl.where(row.moving, row.radial * row.ww, 0.0)
            sphere_sum += tl.where(row.moving, radius * radius, 0.0)
            top = tl.maximum(top, tl.where(row.moving, angle_of(inputs, row, SETTLES), 0.0))
        w_sq, sphere_sq, whole_turn = tl.sum(ww_sum), tl.sum(sphere_sum), tl.max(top)
        is_usable = (w_sq >= TINY) & (w_sq < INFINITY) & (sphere_sq < INFINITY)
        whole_radial = tl.sum(dot_sum) / tl.where(is_usable, w_sq, 1.0)
        tangent_sq = tl.sum(uu_sum) - whole_radial * whole_radial * w_sq
        is_usable = is_usable & (tangent_sq >= TINY) & (tangent_sq < INFINITY)
        fits = is_usable.to(tl.int32)
        to_radius = tl.sqrt(tl.where(is_usable, sphere_sq, 1.0)) / tl.sqrt(tl.where(is_usable, w_sq, 1.0))
        radius_per_tangent = tl.sqrt(tl.where(is_usable, sphere_sq, 1.0)) / tl.sqrt(
            tl.where(is_usable, tangent_sq, 1.0)
        )
        changed = tl.zeros([ROWS_PER_PASS], tl.int32)
        for start in range(0, inputs.n_rows, ROWS_PER_PASS):
            row = load_updates(inputs, start, PROJECT)
            norm, radius = norm_and_radius(row)
            by = tl.abs(to_radius * norm - radius)
            changed = changed | (row.moving & (by > radius * SHARE_CHANGE)).to(tl.int32)
        renewed = tl.max(changed)
    limit = 0.0
    PROTECTS: tl.constexpr = SETTLES & (inputs.least_size is not None)
    if PROTECTS:
        limit = largest_angle(inputs)

    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_updates(inputs, start, PROJECT)
        norm, radius = norm_and_radius(row)
        if WHOLE:
            moving = only_if(fits != 0, row.moving)
            kept = moving
            radius = tl.where(only_if(renewed != 0, kept), to_radius * norm, radius)
            radial, turn = whole_radial + zero, whole_turn + zero
            a = tl.where(kept, to_radius, 1.0)
            f = radius_per_tangent + zero
        else:
            kept, moving, radial, turn = row.directed, row.moving, row.radial, angle_of(inputs, row, SETTLES)
            a = tl.where(kept, radius / norm, 1.0)
            f = radius / tl.sqrt(tl.where(moving, row.tangent_sq, 1.0))
        tl.store(inputs.radius + row.at, radius, mask=only_if(inputs.skipped == 0, row.exist))
        sine, cosine = sine_and_cosine(turn)
        at_rest = tl.where(row.directed, tl.where(row.moving, 1.0, 0.0), 1.0)
        f = tl.where(moving, f * per_lr(sine, lr_of(inputs, row)), at_rest)
        if PROTECTS:
            f = held_back(inputs, row, limit, f)
        finish_updates(inputs, row, moving, radial, tl.where(moving, cosine * a, a), f)


RULES: dict[str | None, Any] = {None: plain} | {
    f.__name__: f for f in (warmup, uniform, angle, equilibrium, sphere)
}
UPDATE_RULES: dict[str | None, Any] = {
    f.__name__.removesuffix("_update"): f for f in (uniform_update, angle_update, equilibrium_update)
}


@triton.jit
def memory_of(rows, n_rows):
    return Memory(c=rows.memory, radius=rows.memory + n_rows, tracked=rows.memory + 2 * n_rows)


@triton.jit
def load_rows(inputs, start):
    """The `Block` of rows from `start` on, with this step's radial test (`elropt.rules.radial_test`)."""
    at = start + tl.arange(0, ROWS_PER_PASS)
    exist = at < inputs.n_rows
    ww = tl.load(inputs.weight_sq + at, mask=exist, other=0.0, cache_modifier=".cg")
    gg = tl.load(inputs.grad_sq + at, mask=exist, other=0.0, cache_modifier=".cg")
    wg = tl.load(inputs.weight_dot_grad + at, mask=exist, other=0.0, cache_modifier=".cg")
    c = tl.load(inputs.c + at, mask=exist, other=0.0)
    radius = tl.load(inputs.radius + at, mask=exist, other=0.0)
    passed = tl.load(inputs.tracked + at, mask=exist, other=-1.0)
    entries = tl.load(inputs.numel + at, mask=exist, other=1.0)
    finite = (ww >= TINY) & (ww < INFINITY) & (gg >= TINY) & (gg < INFINITY)
    cosine = tl.abs(wg) / (tl.sqrt(tl.where(finite, ww, 1.0)) * tl.sqrt(tl.where(finite, gg, 1.0)))
    testing = finite & (cosine < INFINITY) & (passed >= 0) & (passed < RADIAL_TESTS)
    chance = tl.rsqrt(entries)
    zero = cosine < tl.minimum(chance * NEAR_ZERO_BY_SIZE + NEAR_ZERO, chance * NEAR_ZERO_AT_MOST)
    passed = tl.where(testing, tl.where(zero, passed + LEAST_TEST, -1.0), passed)
    directed = (passed > 0) & (ww >= TINY) & (ww < INFINITY) & (gg != -1.0)
    return Block(at, exist, ww, gg, wg, c, radius, passed, directed, directed & finite)


@triton.jit
def load_updates(inputs, start, PROJECT: tl.constexpr):
    """The `UpdateBlock` of rows from `start` on (`elropt.rules.update_parts`). Unless PROJECT, ⟨w,g⟩ counts as 0 once
    the radial tests are over: then w is not read."""
    row = load_rows(inputs, start)
    wm = tl.load(inputs.weight_dot_momentum + row.at, mask=row.exist, other=0.0, cache_modifier=".cg")
    mm = tl.load(inputs.momentum_sq + row.at, mask=row.exist, other=0.0, cache_modifier=".cg")
    gm = tl.load(inputs.grad_dot_momentum + row.at, mask=row.exist, other=0.0, cache_modifier=".cg")
    group = group_of(inputs, row)
    of_g, of_m = per_grad_of(inputs, row, group), of_group(group, inputs.hypers.per_momenta)
    has_gradient = row.directed & (row.gg != INFINITY)
    gg = tl.where(has_gradient, row.gg, 0.0)
    gm = tl.where(has_gradient, gm, 0.0)
    wg = tl.where(has_gradient, row.wg, 0.0)
    if not PROJECT:
        before = tl.load(inputs.tracked + row.at, mask=row.exist, other=-1.0)
        wg = tl.where(before < RADIAL_TESTS, wg, 0.0)
    dot = of_g * wg + of_m * wm
    radial = dot / tl.where(row.directed, row.ww, 1.0)
    parts_sq = of_g * of_g * gg + of_m * of_m * mm
    update_sq = parts_sq + 2 * of_g * of_m * gm
    tangent_sq = update_sq - radial * dot
    tangent_sq = tl.where(tangent_sq < 0, 0.0, tangent_sq)
    moving = row.moving & (tangent_sq >= TINY) & (tangent_sq < INFINITY)
    moving = moving & (tangent_sq > parts_sq * LEAST_TANGENT) & (parts_sq < INFINITY)
    return UpdateBlock(
        row.at, row.exist, row.ww, row.radius, row.passed, row.directed,
        moving, radial, tangent_sq, update_sq, row.directed & (row.gg == INFINITY),
    )  # fmt: skip


@triton.jit
def finish_updates(inputs, row, moving, radial, a, f):
    """Store the controls of a block of rows, w' = a·w − λf·u⊥ (`elropt.rules.controls_of_update`), and the radial tests
    that they have passed."""
    p = tl.where(moving, radial / a + radial_decay(inputs, row), 0.0)
    tl.store(inputs.s + row.at, tl.where(row.too_large, 0.0, 1.0), mask=row.exist)
    tl.store(inputs.a + row.at, a, mask=row.exist)
    tl.store(inputs.p + row.at, p, mask=row.exist)
    lr = lr_of(inputs, row)
    tl.store(inputs.lr + row.at, lr, mask=row.exist)
    tl.store(inputs.f + row.at, f, mask=row.exist)
    norm = tl.sqrt(tl.where(row.directed, row.ww, 1.0))
    count_test(inputs, row, lr * f * tl.sqrt(row.tangent_sq) / (a * norm))


@triton.jit
def radial_step(inputs, row):
    """What the radial part of the update, the decay in it too, multiplies w by; 1 where w does not move."""
    a = 1 - lr_of(inputs, row) * (row.radial + radial_decay(inputs, row))
    return tl.where(row.moving, tl.maximum(a, LEAST_SHRINK), 1.0)


@triton.jit
def log_turn(row, a):
    """log of ‖u⊥‖/(a·‖w‖) of the rows that move, 0 elsewhere."""
    log_w = tl.log(tl.where(row.moving, row.ww, 1.0))
    return (tl.log(tl.where(row.moving, row.tangent_sq, 1.0)) - log_w) / 2 - tl.log(a)


@triton.jit
def lr_of(inputs, row):
    """λ of the rows. Loaded anew wherever it is needed, as `group_of`."""
    return tl.zeros_like(row.ww) + of_group(group_of(inputs, row), inputs.lrs)


@triton.jit
def radial_decay(inputs, row):
    """What this step's decay adds to `UpdateBlock.radial`."""
    group = group_of(inputs, row)
    return per_grad_of(inputs, row, group) * of_group(group, inputs.hypers.decays)


@triton.jit
def angle_of(inputs, row, SETTLES: tl.constexpr):
    """What each row is to turn by, in radians."""
    turn = lr_of(inputs, row)
    if SETTLES:
        turn = settling_angle(inputs, group_of(inputs, row), turn)
    return turn


@triton.jit
def largest_angle(inputs):
    """Of the rows with a direction, by rule "equilibrium"; 0 without any."""
    top = tl.zeros([ROWS_PER_PASS], tl.float32)
    for start in range(0, inputs.n_rows, ROWS_PER_PASS):
        row = load_rows(inputs, start)
        group = group_of(inputs, row)
        top = tl.maximum(
            top, tl.where(row.directed, settling_angle(inputs, group, of_group(group, inputs.lrs)), 0.0)
        )
    return tl.max(top)


@triton.jit
def held_back(inputs, row, limit, f):
    """`f`, less in rows that are not tracked and would move further than `limit` allows (`elropt.rules.hold_back`)."""
    gg = tl.load(inputs.grad_sq + row.at, mask=row.exist, other=0.0, cache_modifier=".cg")
    mm = tl.load(inputs.momentum_sq + row.at, mask=row.exist, other=0.0, cache_modifier=".cg")
    gm = tl.load(inputs.grad_dot_momentum + row.at, mask=row.exist, other=0.0, cache_modifier=".cg")
    gm = tl.where(
        (gg < INFINITY) & (mm < INFINITY), gm, 0.0
    )  # else u is too long, or unknown, whatever ⟨g,m⟩ is
    group = group_of(inputs, row)
    of_g, of_m = per_grad_of(inputs, row, group), of_group(group, inputs.hypers.per_momenta)
    update_sq = of_g * of_g * gg + 2 * of_g * of_m * gm + of_m * of_m * mm
    least = tl.load(inputs.least_size + row.at, mask=row.exist, other=0.0)
    size = tl.maximum(tl.sqrt(tl.where(row.ww > 0, row.ww, 0.0)), least)
    lr = lr_of(inputs, row)
    length = tl.where(lr > 0, lr, 1.0) * tl.sqrt(tl.where(update_sq > 0, update_sq, 0.0))
    allowed = tl.where(limit > 0, limit, 1.0) * of_group(group, inputs.hypers.diffusions) * size
    holds = only_if(limit > 0, (row.passed <= 0) & row.exist & (lr > 0) & (allowed < length))
    return tl.where(holds, allowed / tl.where(holds, length, 1.0), f)


@triton.jit
def settling_angle(inputs, group, lr):
    """√(settling·λ)."""
    settling = 0.0
    if inputs.hypers.settlings is not None:
        settling = of_group(group, inputs.hypers.settlings)
    return tl.sqrt(settling * lr)


@triton.jit
def per_lr(value, lr):
    """value/λ, 0 where λ is 0."""
    return tl.where(lr > 0, value / tl.where(lr > 0, lr, 1.0), 0.0)


@triton.jit
def sine_and_cosine(x):
    """Of 0 ≤ x < 10⁴, to 2⁻²² of the result or of 2⁻²⁴. (`tl.sin` has a table in local memory.)

    x is taken to |x| ≤ π/4 and there to a polynomial. Source: Cephes, sinf.c.
    """
    quarter = (x * 0.6366197723675814 + 0.5).to(tl.int32)
    turns = quarter.to(tl.float32)
    x = ((x - turns * 1.5703125) - turns * 4.837512969970703125e-4) - turns * 7.54978995489188e-8
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z
    cosine = cosine - z / 2 + 1
    swaps = (quarter & 1) != 0
    sine, cosine = tl.where(swaps, cosine, sine), tl.where(swaps, sine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return sine, tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def finish_rows(inputs, row, s, a, turn, over, PROJECT: tl.constexpr):
    """Store the controls of a block of rows and the radial tests that they have passed.

    s, a: the rule's factors, None for 1. turn: the angle of this step, None: as `elropt.rules.step_turn` says.
    over: whether the rule has ended, so that it leaves even a gradient that is too large as it is.
    """
    one = tl.full([ROWS_PER_PASS], 1.0, tl.float32)
    wg = row.wg
    grad_factor, weight_factor = one, one
    if s is not None:
        too_large = only_if(over == 0, row.directed & (row.gg == INFINITY))
        grad_factor = tl.where(too_large, 0.0, s)
        wg = tl.where(too_large, 0.0, wg)
        tl.store(inputs.s + row.at, grad_factor, mask=row.exist)
    if a is not None:
        weight_factor = a
        tl.store(inputs.a + row.at, weight_factor, mask=row.exist)
    hypers = inputs.hypers
    if PROJECT:
        group = group_of(inputs, row)
        per_grad = per_grad_of(inputs, row, group)
        wm = tl.load(inputs.weight_dot_momentum + row.at, mask=row.exist, other=0.0)
        square = tl.where(row.directed, weight_factor * row.ww, 1.0)
        radial = per_grad * (grad_factor * wg / square + of_group(group, hypers.decays))
        radial += of_group(group, hypers.per_momenta) * (wm / square)
        ok = row.directed & (tl.abs(radial) < INFINITY)
        tl.store(inputs.p + row.at, tl.where(ok, radial, 0.0), mask=row.exist)
    lr = of_group(group_of(inputs, row), inputs.lrs)
    tl.store(inputs.lr + row.at, tl.zeros_like(one) + lr, mask=row.exist)
    if turn is None:
        relative = tl.sqrt(tl.where(row.moving, row.gg, 1.0) / tl.where(row.moving, row.ww, 1.0))
        turn = grad_factor / weight_factor * relative * tl.exp(log_lr(inputs, row))
    count_test(inputs, row, turn)


@triton.jit
def per_grad_of(inputs, row, group):
    """∂u/∂g̃."""
    hypers = inputs.hypers
    per_grad = of_group(group, hypers.per_grads)
    if hypers.one_minus_dampening is not None:  # a new buffer takes the whole of its first gradient
        is_new = tl.load(inputs.is_new + row.at, mask=row.exist, other=0.0) != 0
        is_damped = of_group(group, hypers.one_minus_dampening) != 1.0
        per_grad = tl.where(only_if(is_damped, is_new), 1.0, per_grad)
    return per_grad


@triton.jit
def count_test(inputs, row, turn):
    """Store the radial tests passed, with that of this step counted by its angle."""
    remembered = only_if(inputs.skipped == 0, row.exist)
    before = tl.load(inputs.tracked + row.at, mask=remembered, other=-1.0)
    share = turn / TEST_TURN
    counted = before + tl.where(share < 1, tl.maximum(share, LEAST_TEST), 1.0)
    counted = tl.where(
        (row.passed > 0) & (row.passed != before), tl.minimum(counted, RADIAL_TESTS), row.passed
    )
    tl.store(inputs.tracked + row.at, counted, mask=remembered)


@triton.jit
def norm_and_radius(row):
    """‖w‖ (1 where w has no direction) and the norm to keep: at first the one that w has."""
    norm = tl.sqrt(tl.where(row.directed, row.ww, 1.0))
    return norm, tl.where((row.radius == 0) & row.directed, norm, row.radius)


@triton.jit
def log_relative_grad(row):
    """log E of the rows that move, 0 elsewhere."""
    return (tl.log(tl.where(row.moving, row.gg, 1.0)) - tl.log(tl.where(row.moving, row.ww, 1.0))) / 2


@triton.jit
def smooth_c(row):
    """c = ‖g‖·‖w‖, smoothed over the steps; that of this step at the first."""
    now = sphere_grad_norm(row)
    return tl.where(row.c == 0, now, now + SMOOTHING * (row.c - now))


@triton.jit
def sphere_grad_norm(row):
    """c = ‖g‖·‖w‖ of the rows that move, 1 elsewhere."""
    return tl.sqrt(tl.where(row.moving, row.ww, 1.0)) * tl.sqrt(tl.where(row.moving, row.gg, 1.0))


@triton.jit
def log_smooth_relative_grad(row):
    """log E from the smoothed c of the rows that move, 0 elsewhere."""
    log_e = tl.log(smooth_c(row)) - tl.log(tl.where(row.moving, row.ww, 1.0))
    return tl.where(row.moving, log_e, 0.0)


@triton.jit
def group_of(inputs, row):
    """The param groups of the rows. Loaded anew wherever they are needed: to keep them would cost registers."""
    return tl.load(inputs.group_of_row + row.at, mask=row.exist, other=0)


@triton.jit
def log_lr(inputs, row):
    """log λΓ of the param groups of the rows, −∞ where λΓ is 0."""
    group = group_of(inputs, row)
    lr = of_group(group, inputs.lrs) * of_group(group, inputs.hypers.gains)
    lr = tl.where(row.exist, lr, 0.0)
    return tl.where(lr > 0, tl.log(tl.where(lr > 0, lr, 1.0)), -INFINITY)
