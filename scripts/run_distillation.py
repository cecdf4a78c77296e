"""Distil: the same as `moe-compress distill`, with the same arguments."""

import sys

from moe_compress.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
