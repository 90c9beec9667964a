"""``python -m restrictedmem`` is the command ``restrictedmem``."""

from restrictedmem.cli.main import run

run()
