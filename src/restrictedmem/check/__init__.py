"""Races, searched: an explorer of interleavings over production code, scenarios for it, and the same with real processes."""
