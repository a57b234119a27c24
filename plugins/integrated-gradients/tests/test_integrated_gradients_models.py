"""Models from files: what is loaded, and what never is."""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kexue.core.errors import ArgumentError, FileFormatError
from kexue.core.job import Job
from kexue.core.registry import registry
from kexue_integrated_gradients.models import FixedBatch, load_model

X = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def words() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).eval()


def job(**changed: Any) -> Job:
    description = registry.describe("attribution/integrated-gradients")
    settings: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, **changed}
    return Job(description, lambda **_: None, **settings)


def save_exported(path: Path, model: nn.Module, x: Tensor, *, fixed: bool = False) -> None:
    shapes = None if fixed else ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), path)


def save_scripted(path: Path, model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.script(model)
        scripted.save(str(path))


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("name", ["model.pt", "model.ts"])
def test_loads_torchscript(tmp_path: Path, name: str) -> None:
    save_scripted(tmp_path / name, network())
    model = load_model(job(), str(tmp_path / name))
    torch.testing.assert_close(model(X), network()(X))


@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_loads_exported_programs(tmp_path: Path, fixed: int) -> None:
    save_exported(tmp_path / "m.pt2", network(), X[: fixed or 2], fixed=bool(fixed))
    model = load_model(job(), str(tmp_path / "m.pt2"))
    assert isinstance(model, FixedBatch) is bool(fixed)
    for rows in (1, 2, 5):
        torch.testing.assert_close(model(X[:rows]), network()(X[:rows]))
    assert model(X.requires_grad_()).requires_grad
    X.requires_grad_(False)


def test_programs_have_layers_when_asked(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3], [0, 0, 6]])
    save_exported(tmp_path / "m.pt2", words(), ids)
    model: Any = load_model(job(), str(tmp_path / "m.pt2"), by_layer=True)
    assert "0" in dict(model.named_modules())
    save_exported(tmp_path / "fixed.pt2", words(), ids, fixed=True)
    with pytest.raises(ArgumentError, match=r"exported for 2.*`dynamic_shapes`"):
        load_model(job(), str(tmp_path / "fixed.pt2"), by_layer=True)


@pytest.mark.parametrize("name", ["instance", "Class", "make", "function"])
def test_loads_what_a_python_file_holds(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Class(torch.nn.Module):\n"
        "    def forward(self, x):\n        return 2 * x\n"
        "instance = Class()\ndef make():\n    return Class()\n"
        "def function(x, scale=2):\n    return scale * x\nnumber = 3\n",
        encoding="utf-8",
    )
    model = load_model(job(), f"{tmp_path / 'mine.py'}:{name}")
    torch.testing.assert_close(model(X), 2 * X)
    with pytest.raises(ArgumentError, match=r"mine.py:number must be .*Found int"):
        load_model(job(), f"{tmp_path / 'mine.py'}:number")
    with pytest.raises(ArgumentError, match=r"followed by the name.*mine.py:model"):
        load_model(job(), str(tmp_path / "mine.py"))


def test_loads_weights_and_brings_the_model_to_its_type(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))\n",
        encoding="utf-8",
    )
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    given = job(weights=tmp_path / "w.safetensors", dtype=torch.float64)
    model = load_model(given, f"{tmp_path / 'net.py'}:make")
    torch.testing.assert_close(model(X.double()), network().double()(X.double()))
    with pytest.raises(FileFormatError, match="holds weights without a model"):
        load_model(job(), str(tmp_path / "w.safetensors"))


def test_never_unpickles(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(mark)))
    torch.save(Evil(mark), tmp_path / "saved.pt")
    torch.save(network().state_dict(), tmp_path / "state.pt")
    for name in ("plain.pt", "saved.pt", "state.pt"):
        with pytest.raises(FileFormatError, match=r"could run code.*`torch.export.save`.*safetens"):
            load_model(job(), str(tmp_path / name))
    assert not mark.exists()


def _replaced(path: Path, within: str, content: bytes, name: str = "") -> None:
    """Write an archive again with other content where ``within`` is in a name."""
    old = path.with_suffix(".old")
    shutil.move(path, old)
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.namelist():
            if within in member:
                target.writestr(name or member, content)
                if not name:
                    continue
            target.writestr(member, source.read(member))


@pytest.mark.parametrize("legacy", [False, True])
def test_never_unpickles_what_is_in_a_program(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "m.pt2"
    save_exported(path, network(), X)
    stream = io.BytesIO()
    torch.save(((Evil(mark),), {}), stream, _use_new_zipfile_serialization=not legacy)
    _replaced(path, "sample_inputs", stream.getvalue())
    before = dict(os.environ)
    with pytest.raises(FileFormatError, match="pickled objects, which could run code"):
        load_model(job(), str(path))
    assert not mark.exists()
    assert dict(os.environ) == before
    logging.disable()  # what torch then says has a fault that pytest would raise
    try:
        torch.export.load(path)  # the control: torch itself unpickles it
    finally:
        logging.disable(logging.NOTSET)
    assert mark.exists()


@pytest.mark.parametrize("name", ["m/data/aotinductor/model.so", "m/data/constants/opaque_obj_0"])
def test_refuses_programs_with_code(tmp_path: Path, name: str) -> None:
    save_exported(tmp_path / "m.pt2", network(), X)
    _replaced(tmp_path / "m.pt2", "model.json", b"code", name)
    with pytest.raises(FileFormatError, match="could run code when it is loaded"):
        load_model(job(), str(tmp_path / "m.pt2"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _without_graph(path: Path) -> None:
    _replaced(path, "models/", b"{}")


def _without_source(path: Path) -> None:
    _replaced(path, "code/__torch__", b"def")


@pytest.mark.parametrize(
    ("save", "spoil", "words"),
    [
        (save_scripted, _cut, "no model file"),
        (save_scripted, _without_source, "not a whole TorchScript"),
        (lambda path, model: save_exported(path, model, X), _without_graph, "not a whole exported"),
        (lambda path, model: path.write_bytes(b"garbage"), None, "no model file"),
        (lambda path, model: path.write_bytes(b""), None, "is empty"),
        (lambda path, model: None, None, "does not exist"),
        (lambda path, model: path.mkdir(), None, "is a folder"),
    ],
)
def test_refuses_broken_files(
    tmp_path: Path,
    save: Callable[[Path, nn.Module], Any],
    spoil: Callable[[Path], None] | None,
    words: str,
) -> None:
    path = tmp_path / "m.pt"
    save(path, network())
    if spoil is not None:
        spoil(path)
    with pytest.raises(FileFormatError, match=words) as caught:
        load_model(job(), str(path))
    assert "\n" not in str(caught.value)


def test_refuses_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("a/b.txt", "text")
    with pytest.raises(FileFormatError, match="neither TorchScript nor an exported program"):
        load_model(job(), str(tmp_path / "m.zip"))


def test_fills_up_batches() -> None:
    seen: list[int] = []

    class Three(nn.Module):
        def forward(self, x: Tensor, scale: Tensor, power: int) -> Tensor:
            seen.append(len(x))
            return (x * scale) ** power

    model = FixedBatch(Three(), 3)
    scale = torch.arange(5.0)[:, None]
    x = X.clone().requires_grad_()
    out = model(x, scale, 2)
    torch.testing.assert_close(out, (x * scale) ** 2)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, 2 * X * scale**2)
    assert seen == [3, 3]
