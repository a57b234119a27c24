"""The manifest, the examples, and what the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kexue_zlpr
from kexue_zlpr import ZLPR, PairwiseSoftmax, SubsetSoftmax, ThresholdDecoder

CLASSES = (ZLPR, PairwiseSoftmax, SubsetSoftmax, ThresholdDecoder)
README = Path(__file__).parents[1] / "README.md"


def test_manifest_names_what_exists() -> None:
    components = kexue_zlpr.kexue_components()
    assert {component.id for component in components} == {
        "loss/zlpr",
        "loss/pairwise-softmax",
        "loss/subset-softmax",
        "decoder/zlpr",
    }
    targets = {component.target.rpartition(":")[2] for component in components}
    assert targets == {cls.__name__ for cls in CLASSES}
    assert set(kexue_zlpr.__all__) == targets


def test_manifest_is_light() -> None:
    code = "import sys, kexue_zlpr; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("cls", CLASSES)
def test_examples_run(cls: type[ZLPR | ThresholdDecoder]) -> None:
    example = cls.example(generator=torch.Generator().manual_seed(0))
    component = cls(**example.params)
    if isinstance(component, ThresholdDecoder):
        assert len(component.decode(**example.inputs).tolist()) == 4
    else:
        assert component(**example.inputs).isfinite()


def test_readme_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, str(README), "exec"), {})  # noqa: S102  # our own README
