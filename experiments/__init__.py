"""Experiments with jaxprune: one file per question, public names only."""
