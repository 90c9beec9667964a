"""The consumer's interface to restricted memory: notifiers, bindings, pages.

A consumer does what a third kernel module could have done beside the shim and KVM. The service has
to trust a consumer's process. docs/use/consumers.md walks through a whole consumer. The engines
(``kvm``) are two others.
"""

from restrictedmem.consumer.bound_file import BoundFile, NotifierOps, file_is_restrictedmem
from restrictedmem.consumer.consumer import Bound, Consumer

__all__ = ["Bound", "BoundFile", "Consumer", "NotifierOps", "file_is_restrictedmem"]
