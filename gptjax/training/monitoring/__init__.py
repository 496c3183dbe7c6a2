"""Monitoring of a run: metrics, writers, goodput, statistics, profiles, watchdog and report."""
