"""Exact counts and order statistics of arrays, on any mesh of devices."""
