"""The reference MoE: a small, really trained model that ships with the package, so that the main job needs no hub.

`data` turns the Python standard library into train / validation / test text, `recipe` trains the
tokenizer and the model, `card` measures the result and writes its model card.
"""

from pathlib import Path

REFERENCE_MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["REFERENCE_MODEL_DIR"]
