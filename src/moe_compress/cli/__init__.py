"""The command line: `moe-compress COMMAND [key=value ...]`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from moe_compress.allocator import keep_freed_memory
from moe_compress.errors import UserError
from moe_compress.torchrun import rank

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake (one line on stderr), 130 if interrupted.

    What the system refuses (no space, no permission, no such directory) is told in one line too; with
    MOE_COMPRESS_TRACEBACK=1 in the environment it keeps its traceback.
    Under torchrun only rank 0 prints; what goes wrong on another rank alone is still reported, with its number.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if rank() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
        os.environ["TQDM_DISABLE"] = "1"
    keep_freed_memory()
    prefix = f"[rank {rank()}] " if rank() else ""
    try:
        from moe_compress.cli.commands import dispatch

        dispatch(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"{prefix}error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `moe-compress settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None or os.environ.get("MOE_COMPRESS_TRACEBACK") == "1":  # no number: a library's
            raise
        text = str(error).removeprefix(f"[Errno {error.errno}] ")
        print(f"{prefix}error: {text} (MOE_COMPRESS_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    return 0
