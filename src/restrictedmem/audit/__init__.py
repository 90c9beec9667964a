"""Every way an owner has to get at its guest's memory, tried: what ``restrictedmem run --prove`` does.

The guest ``spin hold`` fills its private memory with a pattern that follows from a seed. An owner
without capabilities then tries its routes one by one, and whatever bytes it gets are searched for
that pattern.
"""
