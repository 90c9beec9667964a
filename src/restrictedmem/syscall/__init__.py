"""memfd_restricted(2) for programs that nobody changed: a filter that stops their call, and a supervisor that answers it.

``popen`` starts such a program, ``launch`` becomes one. ``filter`` says which calls stop, and
``supervisor`` what they come to. It waits for nobody: a ``porter``, which has the service, and
``scout``s, which look into programs, do what may have to.
"""
