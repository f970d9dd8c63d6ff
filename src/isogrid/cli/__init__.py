"""The command line, one file a command. What a command needs is imported when it runs, so that help comes at once."""

from isogrid.cli.app import app, main

__all__ = ["app", "main"]
