"""Training: state, step, loop, checkpoints, metrics and their writers, and the report at the end."""
