"""Restricted memory: memfd_restricted(2) and what belongs to it, on a stock kernel."""

__version__ = "0.1.0"
