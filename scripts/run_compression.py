"""Compress: the same as `moe-compress compress`, with the same arguments."""

import sys

from moe_compress.cli import main

if __name__ == "__main__":
    sys.exit(main(["compress", *sys.argv[1:]]))
