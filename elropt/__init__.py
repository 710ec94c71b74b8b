"""elropt: SGD that measures and controls the effective learning rate of every layer.

Begin with `ELRSGD`, in the place of `torch.optim.SGD`. `param_groups` says which layers are scale-invariant, `Recorder`
and `layer_stats` show what they do with any optimizer, `control` puts a rule behind any optimizer.
"""

from . import _checkout as _checkout  # first: what follows needs elropt.kernels
from .controller import Controller as Controller
from .controller import control as control
from .grouping import param_groups as param_groups
from .grouping import width_scaled_groups as width_scaled_groups
from .layer_table import LayerRow as LayerRow
from .layer_table import LayerTable as LayerTable
from .layer_table import effective_lrs as effective_lrs
from .layer_table import layer_stats as layer_stats
from .layer_table import record_next_step as record_next_step
from .optimizer import ELRSGD as ELRSGD
from .recorder import Recorder as Recorder
from .scale_invariance import Invariance as Invariance
from .scale_invariance import equalize_ as equalize_
from .scale_invariance import explain_scale_invariance as explain_scale_invariance
from .scale_invariance import find_scale_invariant as find_scale_invariant

__all__ = [
    "ELRSGD",
    "Controller",
    "Invariance",
    "LayerRow",
    "LayerTable",
    "Recorder",
    "control",
    "effective_lrs",
    "equalize_",
    "explain_scale_invariance",
    "find_scale_invariant",
    "layer_stats",
    "param_groups",
    "record_next_step",
    "width_scaled_groups",
]
__version__ = "0.2.0"
