"""Training of robust networks: configurations, data sets, the loop, runs, evaluation and plots."""
