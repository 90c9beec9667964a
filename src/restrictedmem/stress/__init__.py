"""``check --random``: the scenarios with real processes and a real guest, at random."""
