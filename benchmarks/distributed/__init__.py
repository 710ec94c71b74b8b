"""What sharded layers cost: the all-reduce, measured and computed."""
