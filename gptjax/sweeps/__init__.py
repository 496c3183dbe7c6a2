"""Sweeps: many runs that differ in a few keys of one config. May use all of gptjax; nothing else of it may use this.

space -> trials -> training -> results -> report, and study in place of trials and training where Optuna chooses.
"""
