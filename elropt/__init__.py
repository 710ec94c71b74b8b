"""elropt: SGD that measures and controls the effective learning rate of every layer."""

from . import _checkout as _checkout  # first: what follows needs elropt.kernels
from .monitor import LayerRow as LayerRow
from .monitor import LayerTable as LayerTable
from .monitor import Recorder as Recorder
from .monitor import effective_lrs as effective_lrs
from .monitor import layer_stats as layer_stats
from .monitor import record_next_step as record_next_step
from .optimizer import ELRSGD as ELRSGD
from .scale_invariance import Invariance as Invariance
from .scale_invariance import equalize_ as equalize_
from .scale_invariance import explain_scale_invariance as explain_scale_invariance
from .scale_invariance import find_scale_invariant as find_scale_invariant
from .scale_invariance import param_groups as param_groups
from .width_scaling import width_scaled_groups as width_scaled_groups

__version__ = "0.1.0"
