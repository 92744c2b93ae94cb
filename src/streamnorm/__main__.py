"""``python -m streamnorm``."""

import sys

from streamnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
