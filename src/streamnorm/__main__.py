"""``python -m streamnorm``: the command line, which is the laboratory's. Nothing else of the library imports it."""

import sys

from streamnorm_lab.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
