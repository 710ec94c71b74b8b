"""ImageNet training with any of the optimizers."""
