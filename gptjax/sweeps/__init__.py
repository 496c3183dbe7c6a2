"""Sweeps: many runs that differ in a few keys of one config. No other package of gptjax may import this one.

space -> trials -> training -> results -> report; with Optuna, study replaces trials and training.
"""
