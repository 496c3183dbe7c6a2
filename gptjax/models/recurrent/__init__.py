"""Recurrent models: cells, their loop over time, and attention over a source."""
