"""The claims of the post and the paper, measured."""

from __future__ import annotations
