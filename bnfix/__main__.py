"""``python -m bnfix``: the command line."""

from bnfix.cli import main

main()
