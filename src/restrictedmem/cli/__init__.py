"""The command ``restrictedmem``: one module for each subcommand, data on stdout, talk on stderr."""
