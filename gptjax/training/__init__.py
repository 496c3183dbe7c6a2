"""Training: set-up, step, loop, recovery, populations and monitoring."""
