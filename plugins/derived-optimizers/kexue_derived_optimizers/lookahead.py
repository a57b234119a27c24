"""The two derivations that live in ``kexue_lookahead``, for use beside the other four."""

from __future__ import annotations

from kexue_lookahead import with_lazy, with_lookahead

__all__ = ["with_lazy", "with_lookahead"]
