"""Write the teacher's logits: the same as `moe-compress teacher-logits`, with the same arguments."""

import sys

from moe_compress.cli import main

if __name__ == "__main__":
    sys.exit(main(["teacher-logits", *sys.argv[1:]]))
