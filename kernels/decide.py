"""From the sums over each layer to the factors of its update: `elropt.rules.decide`, in one program."""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .tables import of_group, only_if

__all__ = ["decide"]

ROWS_PER_PASS = tl.constexpr(256)

# As in elropt.rules, where they are explained.
RADIAL_TESTS = tl.constexpr(8)
TEST_TURN = tl.constexpr(0.05)
LEAST_TEST = tl.constexpr(0.01)
NEAR_ZERO_BY_SIZE, NEAR_ZERO, NEAR_ZERO_AT_MOST = tl.constexpr(0.02), tl.constexpr(1e-4), tl.constexpr(0.1)
SMOOTHING = tl.constexpr(0.9)
EQUALIZATION_RATE = tl.constexpr(0.1)
EQUALIZED_VARIANCE = tl.constexpr(0.1**2)
SHARE_CHANGE = tl.constexpr(0.01)
TINY = tl.constexpr(2.0**-126)  # sqrt and log take smaller ones for 0 on a GPU
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def decide(
    sums,
    memory,
    handed_over,
    controls,
    numel,
    group_of_row,
    lrs,
    decays,
    gains,
    per_grads,
    per_momenta,
    one_minus_dampening,
    found_inf,
    n_rows,
    RULE: tl.constexpr,
    WHOLE: tl.constexpr,
    PROJECT: tl.constexpr,
):
    """The controls of this step, and the memory after it.

    sums: [5, R] ‖w‖², ‖g‖² (−1: no gradient at this step), ⟨w,g⟩, ⟨w,m⟩ and, with dampening, whether the buffer is new.
    memory: [3, R] c, radius, radial tests passed. handed_over: 0-dim, for "warmup" only.
    controls: s, a, p and the param group's lr, [4, R]; those that the rule does not need are not written.
    numel, group_of_row: [R]; lrs … one_minus_dampening: by param group, see `of_group`; one_minus_dampening (1−d)
    is None without dampening.
    found_inf: where given and not 0, nothing is changed.

    Sums over the rows are float32, lane by lane and then as a tree. Source: `elropt.rules`, docs/theory.md §9.
    """
    # Flags are integers: that is what the interpreter makes of them when it broadcasts a comparison (see `only_if`).
    skipped = 0
    if found_inf is not None:
        skipped = (tl.load(found_inf) != 0).to(tl.int32)
    lanes = tl.arange(0, ROWS_PER_PASS)
    n = tl.zeros([ROWS_PER_PASS], tl.float32)
    log_e_sum, log_smooth_sum, squares, ww_sum, gg_sum, sphere_sum, veto = n, n, n, n, n, n, n
    top = -INFINITY + n
    for start in range(0, n_rows, ROWS_PER_PASS):
        at = start + lanes
        ww, gg, _, c, radius, passed, directed, moving, exists = _rows(sums, memory, numel, at, n_rows)
        n += moving.to(tl.float32)
        if RULE == "warmup":
            log_lr = _log_lr(group_of_row, lrs, gains, at, exists)
            top = tl.maximum(top, tl.where(moving, log_lr, -INFINITY))
            log_smooth_e = _log_smooth_e(ww, gg, c, moving)
            log_smooth_sum += log_smooth_e
            squares += log_smooth_e * log_smooth_e
            waiting = tl.where(moving, passed != RADIAL_TESTS, passed >= 0)
            # rows without a gradient have not been judged: they matter only if they have had one before
            waiting = tl.where(gg == -1.0, c > 0, waiting)
            veto = tl.maximum(veto, (waiting & exists).to(tl.float32))
        if (RULE == "warmup") | (RULE == "uniform"):
            log_e_sum += _log_e(ww, gg, moving)
        if WHOLE:
            ww_sum += tl.where(moving, ww, 0.0)
            gg_sum += tl.where(moving, gg, 0.0)
            _, radius = _norm_and_radius(ww, radius, directed)
            sphere_sum += tl.where(moving, radius * radius, 0.0)
    count = tl.maximum(tl.sum(n), 1.0)
    log_target = tl.sum(log_e_sum) / count
    whole_norm, whole_grad_norm, whole_sphere = 1.0, 1.0, 1.0
    fits, changed = 1, tl.zeros([ROWS_PER_PASS], tl.int32)
    if WHOLE:
        w_sq, g_sq, sphere_sq = tl.sum(ww_sum), tl.sum(gg_sum), tl.sum(sphere_sum)
        fits = ((w_sq > 0) & (w_sq < INFINITY) & (g_sq < INFINITY) & (sphere_sq < INFINITY)).to(tl.int32)
        whole_norm = tl.sqrt(tl.where(fits != 0, w_sq, 1.0))
        whole_grad_norm = tl.sqrt(tl.where(fits != 0, g_sq, 1.0))
        whole_sphere = tl.sqrt(tl.where(fits != 0, sphere_sq, 1.0))
        for start in range(0, n_rows, ROWS_PER_PASS):
            ww, _, _, _, radius, _, directed, moving, _ = _rows(sums, memory, numel, start + lanes, n_rows)
            weight_norm, radius = _norm_and_radius(ww, radius, directed)
            by = tl.abs(whole_sphere / whole_norm * weight_norm - radius)
            changed = changed | (moving & (by > radius * SHARE_CHANGE)).to(tl.int32)
    renewed = tl.max(changed)

    over, ends = 0, 0
    log_smooth_target, critical = 0.0, 0.0
    if RULE == "warmup":
        over = (tl.load(handed_over) != 0).to(tl.int32)
        critical = -tl.max(top)
        log_target = tl.minimum(log_target, critical)
        log_smooth_mean = tl.sum(log_smooth_sum) / count
        log_smooth_target = tl.minimum(log_smooth_mean, critical)
        beyond = log_smooth_mean - log_smooth_target
        variance = tl.sum(squares) / count - log_smooth_mean * log_smooth_mean + beyond * beyond
        ends = ((tl.sum(n) > 0) & (tl.max(veto) == 0) & (variance < EQUALIZED_VARIANCE)).to(tl.int32)
        if (ends != 0) & (over == 0) & (skipped == 0):
            tl.store(handed_over, 1.0)

    for start in range(0, n_rows, ROWS_PER_PASS):
        at = start + lanes
        ww, gg, wg, c, radius, passed, directed, moving, exists = _rows(sums, memory, numel, at, n_rows)
        if RULE == "warmup":  # turns all that move by λE★
            turn = tl.exp(log_target - critical)
            _count_test(memory + 2 * n_rows + at, passed, turn, only_if(skipped == 0, exists))
        s = tl.full([ROWS_PER_PASS], 1.0, tl.float32)
        a = s
        if RULE == "warmup":
            offset = tl.where(moving, _log_e(ww, gg, moving) - log_target, 0.0)
            smooth_offset = tl.where(moving, _log_smooth_e(ww, gg, c, moving) - log_smooth_target, 0.0)
            rescaled = tl.where(ends != 0, smooth_offset, EQUALIZATION_RATE * offset) / 2
            rescaled = tl.where(only_if(over == 0, passed == RADIAL_TESTS), rescaled, 0.0)
            a = tl.exp(rescaled)
            s = tl.exp(tl.where(over != 0, 0.0, rescaled - offset))
            remembers = only_if((over == 0) & (skipped == 0), moving)
            tl.store(memory + at, _smooth_c(ww, gg, c, moving), mask=remembers)
        elif RULE == "uniform":
            s = tl.where(moving, tl.exp(log_target - _log_e(ww, gg, moving)), 1.0)
        elif (RULE == "angle") | (RULE == "sphere"):
            norm, radius = _norm_and_radius(ww, radius, directed)
            grad_norm = tl.sqrt(tl.where(moving, gg, 1.0))
            sphere, kept = radius, directed
            if WHOLE:
                moving = only_if(fits != 0, moving)
                kept = moving
                radius = tl.where(only_if(renewed != 0, kept), whole_sphere / whole_norm * norm, radius)
                zero = tl.zeros([ROWS_PER_PASS], tl.float32)
                sphere, norm, grad_norm = whole_sphere + zero, whole_norm + zero, whole_grad_norm + zero
            a = tl.where(kept, sphere / norm, 1.0)
            s = tl.where(moving, sphere / grad_norm if RULE == "angle" else sphere * norm, 1.0)
            tl.store(memory + n_rows + at, radius, mask=only_if(skipped == 0, exists))
        if RULE is not None:
            too_large = only_if(over == 0, directed & (gg == INFINITY))
            s = tl.where(too_large, 0.0, s)
            wg = tl.where(too_large, 0.0, wg)
            tl.store(controls + at, s, mask=exists)
        if (RULE == "warmup") | (RULE == "angle") | (RULE == "sphere"):
            tl.store(controls + n_rows + at, a, mask=exists)
        if PROJECT:
            group = tl.load(group_of_row + at, mask=exists, other=0)
            per_grad = of_group(group, per_grads)
            if one_minus_dampening is not None:  # a new buffer takes the whole of its first gradient
                is_new = tl.load(sums + 4 * n_rows + at, mask=exists, other=0.0) != 0
                per_grad = tl.where(
                    only_if(of_group(group, one_minus_dampening) != 1.0, is_new), 1.0, per_grad
                )
            wm = tl.load(sums + 3 * n_rows + at, mask=exists, other=0.0)
            square = tl.where(directed, a * ww, 1.0)
            radial = per_grad * (s * wg / square + of_group(group, decays))
            radial += of_group(group, per_momenta) * (wm / square)
            ok = directed & (tl.abs(radial) < INFINITY)
            tl.store(controls + 2 * n_rows + at, tl.where(ok, radial, 0.0), mask=exists)
        lr = of_group(tl.load(group_of_row + at, mask=exists, other=0), lrs)
        tl.store(controls + 3 * n_rows + at, tl.zeros_like(s) + lr, mask=exists)
        if RULE != "warmup":
            turn = _turn(ww, gg, s, a, moving) * tl.exp(_log_lr(group_of_row, lrs, gains, at, exists))
            _count_test(memory + 2 * n_rows + at, passed, turn, only_if(skipped == 0, exists))


@triton.jit
def _rows(sums, memory, numel, at, n_rows):
    """Of the rows `at`: ‖w‖², ‖g‖², ⟨w,g⟩, c, radius, the tests passed after this step, whether w has a
    direction, whether it moves, and whether there is such a row."""
    exists = at < n_rows
    ww = tl.load(sums + at, mask=exists, other=0.0, cache_modifier=".cg")
    gg = tl.load(sums + n_rows + at, mask=exists, other=0.0, cache_modifier=".cg")
    wg = tl.load(sums + 2 * n_rows + at, mask=exists, other=0.0, cache_modifier=".cg")
    c = tl.load(memory + at, mask=exists, other=0.0)
    radius = tl.load(memory + n_rows + at, mask=exists, other=0.0)
    passed = tl.load(memory + 2 * n_rows + at, mask=exists, other=-1.0)
    entries = tl.load(numel + at, mask=exists, other=1.0)
    finite = (ww >= TINY) & (ww < INFINITY) & (gg >= TINY) & (gg < INFINITY)
    cosine = tl.abs(wg) / (tl.sqrt(tl.where(finite, ww, 1.0)) * tl.sqrt(tl.where(finite, gg, 1.0)))
    testing = finite & (cosine < INFINITY) & (passed >= 0) & (passed < RADIAL_TESTS)
    chance = tl.rsqrt(entries)
    zero = cosine < tl.minimum(chance * NEAR_ZERO_BY_SIZE + NEAR_ZERO, chance * NEAR_ZERO_AT_MOST)
    passed = tl.where(testing, tl.where(zero, passed + LEAST_TEST, -1.0), passed)
    directed = (passed > 0) & (ww >= TINY) & (ww < INFINITY) & (gg != -1.0)
    return ww, gg, wg, c, radius, passed, directed, directed & finite, exists


@triton.jit
def _count_test(held, passed, turn, mask):
    """Keep the tests passed, with the one of this step counted by its angle."""
    before = tl.load(held, mask=mask, other=-1.0)
    share = turn / TEST_TURN
    counted = before + tl.where(share < 1, tl.maximum(share, LEAST_TEST), 1.0)
    counted = tl.where((passed > 0) & (passed != before), tl.minimum(counted, RADIAL_TESTS), passed)
    tl.store(held, counted, mask=mask)


@triton.jit
def _turn(ww, gg, s, a, moving):
    """Tangent of the angle that the gradient turns w by, in 1/lr."""
    return s / a * tl.sqrt(tl.where(moving, gg, 1.0) / tl.where(moving, ww, 1.0))


@triton.jit
def _norm_and_radius(ww, radius, directed):
    """‖w‖ (1 where w has no direction) and the norm to keep: at first the one that w has."""
    norm = tl.sqrt(tl.where(directed, ww, 1.0))
    return norm, tl.where((radius == 0) & directed, norm, radius)


@triton.jit
def _log_e(ww, gg, moving):
    """log E of the rows that move, 0 elsewhere."""
    return (tl.log(tl.where(moving, gg, 1.0)) - tl.log(tl.where(moving, ww, 1.0))) / 2


@triton.jit
def _smooth_c(ww, gg, c, moving):
    now = tl.sqrt(tl.where(moving, ww, 1.0)) * tl.sqrt(tl.where(moving, gg, 1.0))
    return tl.where(c == 0, now, now + SMOOTHING * (c - now))


@triton.jit
def _log_smooth_e(ww, gg, c, moving):
    log_e = tl.log(_smooth_c(ww, gg, c, moving)) - tl.log(tl.where(moving, ww, 1.0))
    return tl.where(moving, log_e, 0.0)


@triton.jit
def _log_lr(group_of_row, lrs, gains, at, exists):
    group = tl.load(group_of_row + at, mask=exists, other=0)
    lr = tl.where(exists, of_group(group, lrs) * of_group(group, gains), 0.0)
    return tl.where(lr > 0, tl.log(tl.where(lr > 0, lr, 1.0)), -INFINITY)
