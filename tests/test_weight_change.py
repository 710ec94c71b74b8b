"""elropt.weight_change: angles and lengths that are known beforehand, in pieces and by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elropt import weight_change as module
from elropt.weight_change import Rows, gradient_sums, weight_change


def turned(w: Tensor, angle: float, length: float, seed: int) -> Tensor:
    """w turned by `angle`, and then `length` times as long, by the polar decomposition of a step."""
    across = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    across -= (across * w).sum() / (w * w).sum() * w
    across *= w.norm() / across.norm()
    half = math.sin(angle / 2) ** 2
    return length * (w + (math.sin(angle) * across - 2 * half * w))


@settings(deadline=None, max_examples=40)
@given(
    angle=st.floats(-9, 0.45).map(lambda exponent: 10**exponent),
    length=st.sampled_from([1.0, 1 - 1e-6, 0.5, 3.0]),
    chunk=st.sampled_from([7, 2**22]),
    seed=st.integers(0, 99),
)
def test_a_known_turn_and_length(angle: float, length: float, chunk: int, seed: int) -> None:
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    new = turned(w, angle, length, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found, relative, radial = weight_change([w], [new], Rows({w: 1}))[:, 0].tolist()
    assert found == pytest.approx(angle, rel=1e-11, abs=4e-16)  # w' itself is rounded
    assert radial == pytest.approx(length - 1, rel=1e-9, abs=1e-15)
    assert relative == pytest.approx(
        math.sqrt((length - 1) ** 2 + 4 * length * math.sin(angle / 2) ** 2), rel=1e-7
    )


def test_rows_of_filters_are_those_of_each_index() -> None:
    w = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    new = w + 0.01 * torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    lone = torch.ones(2, 2)
    rows = Rows({w: 4, lone: 1}, {w})
    found = weight_change([w, lone], [new, 2 * lone], rows)
    for i in range(4):
        alone = weight_change([w[i]], [new[i]], Rows({w[i]: 1}))
        torch.testing.assert_close(found[:, i], alone[:, 0], rtol=1e-12, atol=0)
    assert found[:, 4].tolist() == [0, 1, 1]
    sums = gradient_sums([w, lone], [new, None], rows)
    assert sums[1, :4].tolist() == pytest.approx(new.double().square().sum((1, 2)).tolist())
    assert sums[:, 4].isnan().all()


def test_what_has_no_direction_is_not_known() -> None:
    zero, same = torch.zeros(3, 3), torch.ones(3, 3)
    changes = weight_change([zero, same], [same, same], Rows({zero: 1, same: 1}))
    assert changes[:2, 0].isnan()[0]
    assert changes[:, 1].tolist() == [0, 0, 0]
