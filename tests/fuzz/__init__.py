"""Fuzzing: a target for each parser of bytes from outside, its corpus, and mistakes that the corpus has to find."""
