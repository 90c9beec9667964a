"""The search for races: an explorer of interleavings of production code, and scenarios."""
