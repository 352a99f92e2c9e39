"""python -m sedetect: the command line."""

from sedetect.cli import main

main()
