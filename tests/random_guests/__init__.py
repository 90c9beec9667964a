"""Random guests on both engines: what they compute must be the same (``scripts/fuzz-engines``)."""
