"""Numbers, structs and calls of the kernel's headers, one module for each subject.

These modules must not import from a higher layer.
"""
