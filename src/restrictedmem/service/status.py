"""The state that a service reports (STATUS): its files and its consumers, for ``ps``."""

from restrictedmem.fs.filesystem import FileSystem
from restrictedmem.fs.usage import Usage
from restrictedmem.service.consumer_process import ConsumerProcess


def of_files(filesystem: FileSystem, usage: Usage | None) -> dict[str, object]:
    """Return the current descriptors, and what owners did with them if that is counted."""
    # Files may be closed while we look, and hold nothing then. We take no reference: it could be
    # the last one, and this thread would free gigabytes.
    held = filesystem.files()
    files = [
        {
            "ino": ino,
            "size": file.size,
            "resident": file.backing.resident(),
            "notifiers": file.notifier_count,
        }
        for ino, file in held.items()
    ]
    return {
        "descriptors": files,
        "usage": None if usage is None else usage.report(list(held.values())),
    }


def of_consumer(consumer: ConsumerProcess) -> dict[str, object]:
    """Return a consumer's bindings and numbers, and its own report."""
    return {
        "name": consumer.name,
        "number": consumer.number,
        "files": sorted(binding.ino for binding in consumer.all_bindings()),
        "invalidations": consumer.invalidations,
        "in_progress": consumer.in_progress,
        "report": consumer.report,
    }
