"""``check --random``: scenarios of ``check`` at random, with real processes and guests."""
