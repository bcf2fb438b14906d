"""Export an edit or a chain: an ordinary folder, a delta file, a LoRA adapter, a receipt."""

from editlib.export.delta import Delta, make_delta
from editlib.export.folder import save_edited
from editlib.export.receipt import RECEIPT, asked_as, make_receipt, read_receipt

__all__ = [
    "RECEIPT",
    "Delta",
    "asked_as",
    "make_delta",
    "make_receipt",
    "read_receipt",
    "save_edited",
]
