"""`python -m isogrid`."""

from isogrid.cli import main

main()
