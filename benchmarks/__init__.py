"""Benchmarks of time and memory, each beside a floor: the least that it could cost.

``scripts/bench`` runs them.
"""
