"""The command ``restrictedmem``, started by ``python -m restrictedmem``."""

from restrictedmem.cli.main import run

run()
