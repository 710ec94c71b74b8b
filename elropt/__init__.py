"""elropt: SGD that measures and controls the effective learning rate of every layer."""

from .monitor import LayerRow as LayerRow
from .monitor import LayerTable as LayerTable
from .monitor import Recorder as Recorder
from .monitor import effective_lrs as effective_lrs
from .monitor import layer_stats as layer_stats
from .optimizer import ELRSGD as ELRSGD

__version__ = "0.1.0"
