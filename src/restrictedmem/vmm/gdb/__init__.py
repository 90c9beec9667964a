"""A GDB remote stub on the owner's side, for a VM that was made with ``debug``."""
