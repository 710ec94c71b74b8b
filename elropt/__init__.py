"""elropt: SGD that measures and controls the effective learning rate of every layer."""

__version__ = "0.1.0"
