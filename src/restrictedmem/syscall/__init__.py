"""memfd_restricted(2) for programs that nobody changed: a filter that stops their call, and a supervisor that answers it."""
