"""The messages between an owner and its engine.

They are requests, exits, hypercall numbers, trace events and the measurement.
"""
