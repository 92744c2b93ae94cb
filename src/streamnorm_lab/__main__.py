"""``python -m streamnorm_lab``, the same as ``python -m streamnorm`` and the command ``streamnorm``."""

import sys

from streamnorm_lab.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
