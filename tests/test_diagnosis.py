"""elropt.diagnosis: what it says of hand-made histories."""

import numpy as np

from elropt.diagnosis import TITLES, diagnose
from elropt.run_history import RunHistory


def test_a_layer_that_turns_too_far_is_named_with_its_steps() -> None:
    angle = np.full((5, 2), 0.01)
    angle[1, 1], angle[3, 1] = 0.5, 0.4
    nothing = np.full((5, 2), np.nan)
    run = RunHistory(np.arange(0, 50, 10), ["a", "b"], nothing, nothing, nothing[:, 0], [], angle)
    (finding,) = diagnose(run)
    assert (finding.kind, finding.severity) == ("large_angle", "warning")
    assert (finding.layers, finding.steps) == (("b",), (10, 30))
    assert "0.5 rad" in finding.what
    assert finding.kind in TITLES
