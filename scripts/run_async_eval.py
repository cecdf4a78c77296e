"""Evaluate checkpoints as they appear: the same as `moe-compress watch`, with the same arguments."""

import sys

from moe_compress.cli import main

if __name__ == "__main__":
    sys.exit(main(["watch", *sys.argv[1:]]))
