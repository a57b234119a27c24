"""Scaffolding for experiments: embedded data, tiny reference models, taggers.

Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

from kexue.core.component import Dataset

__all__ = ["DATASETS"]

DATASETS = (
    Dataset(
        "segmentation",
        "kexue.core.lab.data:segmentation",
        "English reference text of CPython with its spaces removed, to be segmented into words.",
    ),
    Dataset(
        "text",
        "kexue.core.lab.data:text",
        "The same text as plain lines.",
    ),
    Dataset(
        "digits",
        "kexue.core.lab.data:digits",
        "1797 hand-written digits of 8 × 8 pixels (needs scikit-learn).",
    ),
)
"""Kexue's own data; a plugin adds others with the hook ``kexue_datasets``."""
