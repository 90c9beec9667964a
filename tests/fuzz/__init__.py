"""Fuzzing: a target for each parser of foreign bytes, its corpus, and planted mistakes.

The corpus has to find each planted mistake.
"""
