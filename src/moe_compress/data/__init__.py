"""Text for calibration, distillation and evaluation: documents from any source, packed to rows of fixed length."""

from moe_compress.data.packing import packed_dataset
from moe_compress.data.sources import load_documents

__all__ = ["load_documents", "packed_dataset"]
