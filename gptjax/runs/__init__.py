"""A run on disk: its directory, checkpoints, adapters and what it was pretrained from."""
