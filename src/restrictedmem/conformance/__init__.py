"""One suite of cases for every kind of private memory: the kernel's, and this project's.

A case is data: what it does, what each kind of memory answers, and the source of that answer. A
column is one kind of memory, such as guest_memfd with one set of flags.
"""
