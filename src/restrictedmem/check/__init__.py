"""Races, searched: an explorer of interleavings over production code, and scenarios for it."""
