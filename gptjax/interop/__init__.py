"""Hugging Face in and out: what its folders hold becomes a run's, and a run's becomes such a folder."""
