"""Cost of a train step, on this machine or on an absent mesh: FLOPs, memory, time and communication."""
