"""Answers read off a graph: wiring, stages, input axes, points for gates."""
