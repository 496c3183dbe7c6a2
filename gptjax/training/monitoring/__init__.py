"""What a run records of itself: metrics, writers, goodput, statistics, profiles, watchdog and report."""
