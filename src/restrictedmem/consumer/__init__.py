"""What a third kernel module had of restricted memory, for a process that the service trusts: notifiers, bindings, pages.

docs/use/consumers.md walks through a whole consumer; the engines (``kvm``) are two others.
"""

from restrictedmem.consumer.bound_file import BoundFile, NotifierOps, file_is_restrictedmem
from restrictedmem.consumer.consumer import Bound, Consumer

__all__ = ["Bound", "BoundFile", "Consumer", "NotifierOps", "file_is_restrictedmem"]
