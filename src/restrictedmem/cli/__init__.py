"""The command ``restrictedmem``: one module for each subcommand.

Data goes to stdout, messages for people go to stderr.
"""
