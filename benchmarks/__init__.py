"""What the project promises to be fast or small, measured against the least that it could cost (``scripts/bench``)."""
