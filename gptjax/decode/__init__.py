"""Decoding: logits in, tokens out."""
