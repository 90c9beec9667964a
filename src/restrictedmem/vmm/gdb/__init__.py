"""A GDB remote stub in the owner's process, for a VM that was made with ``debug``."""
