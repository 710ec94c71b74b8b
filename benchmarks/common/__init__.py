"""What the benchmarks share: data, models, training, statistics."""
