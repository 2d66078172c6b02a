"""PDP against its baselines."""
