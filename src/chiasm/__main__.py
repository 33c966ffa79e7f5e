"""``python -m chiasm`` is ``chiasm``; torchrun starts it so (``torchrun -m chiasm train …``)."""

import sys

from chiasm.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
