"""What a step costs, on this machine or on a mesh that is not here: FLOPs, memory, time and communication."""
