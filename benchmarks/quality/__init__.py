"""Quality at equal bytes: every method compresses the same model to the same expert bytes, is measured, distilled by
the same loop on the same tokens, and measured again. See docs/QUALITY.md.

    python -m benchmarks.quality run   --model reference --methods svd ours --ratios 0.25 --seeds 42
    python -m benchmarks.quality table --model reference
    python -m benchmarks.quality train --model coarse
"""
