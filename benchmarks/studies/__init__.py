"""Studies: each claim that elropt stands on as a command that measures it, prints it and draws it."""

from benchmarks.studies.control.run import CONTROL
from benchmarks.studies.dynamics.run import DYNAMICS
from benchmarks.studies.evidence.run import EVIDENCE
from benchmarks.studies.linearization.run import LINEARIZATION
from benchmarks.studies.radians.run import RADIANS
from benchmarks.studies.regimes.run import REGIMES
from benchmarks.studies.spread.run import SPREAD
from benchmarks.studies.swap_in.run import SWAP_IN
from benchmarks.studies.warmup.run import WARMUP
from benchmarks.studies.widths.run import WIDTHS

STUDIES = {
    study.name: study
    for study in (
        WARMUP,
        SPREAD,
        SWAP_IN,
        DYNAMICS,
        RADIANS,
        REGIMES,
        WIDTHS,
        LINEARIZATION,
        CONTROL,
        EVIDENCE,
    )
}
