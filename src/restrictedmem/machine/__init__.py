"""Probes of what the machine offers (``doctor``).

Each probe tries one thing. A probe is quick, needs no privilege, and leaves nothing behind.
"""
