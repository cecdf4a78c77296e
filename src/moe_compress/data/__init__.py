"""Text for calibration, distillation and evaluation: documents from any source, as rows of token ids."""

from moe_compress.data.packing import Row, packed_dataset, read_rows, rows_in_memory
from moe_compress.data.sources import load_documents

__all__ = ["Row", "load_documents", "packed_dataset", "read_rows", "rows_in_memory"]
