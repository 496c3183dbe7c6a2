"""Evaluation: metrics and tasks on a trained model."""
