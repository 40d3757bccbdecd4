"""``python -m eamnet``: the ``eamnet`` command."""

import sys

from eamnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
