"""The audit: ``restrictedmem run --prove`` tries every known route to the guest's memory.

The guest ``spin hold`` fills its private memory with a pattern that follows from a seed. An owner
without capabilities then tries its routes one by one. All bytes that it gets are searched for this
pattern.
"""
