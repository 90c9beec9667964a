"""memfd_restricted(2) for unmodified programs.

A filter stops the call, and a supervisor answers it. ``popen`` starts such a program, and
``exec_program`` becomes one. ``filter`` says which calls stop, and ``supervisor`` answers them. The
supervisor waits for nobody. Other processes do the work that may have to wait: a ``porter`` has the
service, and ``scout`` processes look into programs.
"""
