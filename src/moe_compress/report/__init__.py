"""The evidence of a run as a page to read: tables, figures, findings."""

from moe_compress.report.page import write_report

__all__ = ["write_report"]
