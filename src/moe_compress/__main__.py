"""`python -m moe_compress`, also under torchrun (`torchrun -m moe_compress distill ...`)."""

import sys

from moe_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
