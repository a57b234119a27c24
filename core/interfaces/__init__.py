"""The contracts, one file per kind. Importing this package imports none of them."""

from __future__ import annotations

from kexue.core.component import Interface

__all__ = ["INTERFACES"]


def _builtin(
    kind: str,
    class_name: str,
    method: str,
    summary: str,
    *,
    fit: str = "",
    apply: str = "",
    several: bool = False,
) -> Interface:
    module = f"kexue.core.interfaces.{kind}"
    return Interface(
        kind=kind,
        target=f"{module}:{class_name}",
        summary=summary,
        method=method,
        run=f"{module}:run",
        fit=fit,
        apply=apply,
        checks=f"kexue.core.conformance.{kind}:checks",
        template=f"kexue.core:templates/{kind}.py.txt",
        several=several,
    )


INTERFACES = (
    _builtin("loss", "Loss", "forward", "Scores and targets to a value to be minimised."),
    _builtin(
        "optimizer",
        "Optimizer",
        "step",
        "Gradients to parameters that lower the loss.",
        several=True,
    ),
    _builtin(
        "decoder",
        "Decoder",
        "decode",
        "Scores to discrete sequences.",
        fit="kexue.core.lab.tagging:fit",
        apply="kexue.core.lab.tagging:apply",
    ),
    _builtin("sampler", "Sampler", "sample", "A distribution to draws from it."),
    _builtin(
        "generator",
        "Generator",
        "generate",
        "Data to new data like it.",
        fit="kexue.core.interfaces.generator:fit",
        apply="kexue.core.interfaces.generator:apply",
    ),
    _builtin("similarity", "Similarity", "__call__", "Two objects to how alike they are."),
    _builtin("layer", "Layer", "forward", "A sequence of features to a sequence of features."),
)
"""Kexue's own kinds; a plugin adds others with the hook ``kexue_interfaces``."""
