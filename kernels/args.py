"""The arguments of the kernels, in groups that belong together. A pointer is a tensor at the launch.

A kernel asks whether a field is None, not whether a group is: triton 3.6 cannot, if the group has a None in it. Only
`Rounding`, which has none, may be absent. A group costs the host about 0.4 µs a launch, as much as its fields save if
there are three or more. So groups that do not change from step to step are made once, and `grad_scale` and
`found_inf`, of which either may be absent, are no group.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Factors", "Hypers", "Rounding", "Rows", "Scratch", "Tables", "Values"]

# Of all param groups: a tuple with an entry per group, or float32 values on the device.
Values = tuple[float | Tensor, ...] | Tensor


class Tables(NamedTuple):
    """Where the tensors of a launch are, see `tables.Table`."""

    addresses: Tensor
    segments: Tensor
    chunk_segment: Tensor


class Scratch(NamedTuple):
    """Memory of `measure_kernel` and `cooperative_kernel`.

    partials: float32 [chunks, 4], ‖w‖², ‖g‖², ⟨w,g⟩ and ⟨w,m⟩ of each chunk.
    sums: float32 [7, R], these of each row, then ‖m‖² and ⟨g,m⟩, and with dampening, whether its buffer is new.
    ‖g‖² = −1: no gradient.
    counters: int32 [R + 1], programs done of each row, then rows done and programs without a row.
    gate: int32, goes up by one once all is decided; only `cooperative_kernel` has one.
    of_momentum: float32 [chunks, 2], ‖m‖² and ⟨g,m⟩ of each chunk; None where they are not measured.
    """

    partials: Tensor
    sums: Tensor
    counters: Tensor
    gate: Tensor | None = None
    of_momentum: Tensor | None = None


class Rows(NamedTuple):
    """What `decide` reads and writes beside the sums; all None where nothing is decided.

    memory: float32 [3, R], the rule's c, radius and tracked (radial tests passed).
    handed_over: float32 [2], of a rule that ends: whether it has, and the largest λΓ so far.
    controls: float32 [5, R], s, a, p, the learning rate of the param group, and f.
    numel: float32 [R], elements of each row. group_of_row: int32 [R].
    least_size: float32 [R], what counts as ‖w‖ at least, where rows that are not tracked are held back.
    """

    memory: Tensor | None = None
    handed_over: Tensor | None = None
    controls: Tensor | None = None
    numel: Tensor | None = None
    group_of_row: Tensor | None = None
    least_size: Tensor | None = None


class Hypers(NamedTuple):
    """The hyper-parameters of all param groups but for their learning rates; None where a launch needs none.

    one_minus_dampening: 1−d; None if d is 0 in every group. gains, per_grads, per_momenta, settlings,
    diffusions: see `GroupHyper`; the last two are None if all are 0.
    """

    momenta: Values | None = None
    one_minus_dampening: Values | None = None
    decays: Values | None = None
    gains: Values | None = None
    per_grads: Values | None = None
    per_momenta: Values | None = None
    settlings: Values | None = None
    diffusions: Values | None = None


class Factors(NamedTuple):
    """Of the update of each row, float32 [R]: s, a, p and f. None stands for 1, 1, 0 and 1."""

    grad_factor: Tensor | None = None
    weight_factor: Tensor | None = None
    radial: Tensor | None = None
    lr_factor: Tensor | None = None


class Rounding(NamedTuple):
    """Of stochastic rounding: a seed, and a 0-dim int64 that counts steps."""

    seed: int
    step: Tensor
