"""Whether several processes compute what one does, for optimizers and whatever else is trained.

A test starts a worker, a file beside it, and looks at what it measured::

    def test_two_processes_take_the_steps_of_one():
        found = run_processes(Path(__file__).with_name("distributed_worker.py"))
        assert found["moved, plain"] > 1e-3
        assert max(found[f"{way}, plain"] for way in ("ddp", "fsdp2", "checkpoint")) < 1e-14

The worker says what is to be measured, and runs in each process::

    def distances(mesh):
        return Training().compare(mesh, {"plain": lambda params: Mine(params, lr=0.1)})

    if __name__ == "__main__":
        measure(distances)

The processes meet in a folder of their own, need no port, and end without torch's help.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from kexue.core.conformance.kit import require
from kexue.core.errors import WorkError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "Training",
    "distance",
    "gathered",
    "has_gloo",
    "measure",
    "placed",
    "run_processes",
    "whole",
]

Make = Callable[[Any], Any]
"""Parameters to an optimizer of them."""

Carry = Callable[[nn.Module, Any, nn.Module, Any], None]
"""A model and its optimizer, and those that the state of the optimizer is carried to."""

_FOLDER = "KEXUE_RENDEZVOUS"
_FOUND = "found.json"
_WORDS = 4000  # of what a process that failed has said, at the end
_POLL = 0.05  # seconds


# -- the test's side -------------------------------------------------------------------------------


def has_gloo() -> bool:
    """Return whether torch is built with what the processes talk through."""
    return torch.distributed.is_available() and torch.distributed.is_gloo_available()


def run_processes(
    worker: str | Path, *, processes: int = 2, timeout: float = 300
) -> dict[str, float]:
    """Run a worker in several processes, and return what it measured.

    Args:
        worker: A Python file that calls :func:`measure`.
        processes: How many.
        timeout: Seconds after which they are given up.

    Returns:
        What the function of the process of rank 0 returned.

    Raises:
        WorkError: If a process fails or they take too long, with the end of what was said; none of
            them is left running.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        words = [Path(folder, f"{rank}.txt") for rank in range(processes)]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank, path in enumerate(words):
                given = {"RANK": rank, "WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
                env = {**os.environ, **{k: str(v) for k, v in given.items()}, _FOLDER: folder}
                with path.open("wb") as file:  # not a pipe: nobody need empty it
                    started = subprocess.Popen(  # noqa: S603
                        [sys.executable, str(worker)],
                        stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env,
                    )  # fmt: skip
                    running.append(started)
            _await(running, words, f"{Path(worker).name} in {processes} processes", timeout)
        finally:
            for process in running:
                process.kill()
                process.wait()
        result = Path(folder, _FOUND)
        if not result.exists():
            raise WorkError(
                f"{Path(worker).name} must call measure(function). It measured nothing."
            )
        found: dict[str, float] = json.loads(result.read_text())
        return found


def _await(
    running: list[subprocess.Popen[bytes]], words: list[Path], name: str, timeout: float
) -> None:
    """Wait until all have ended well; raise as soon as one has not."""
    end = time.monotonic() + timeout
    while True:
        late = time.monotonic() > end  # asked first, so that what has just ended counts as ended
        ended = [process.poll() for process in running]
        failed = {rank: f"ended with exit status {s}" for rank, s in enumerate(ended) if s}
        if late and not failed:
            went_on = f"did not end within {timeout:g} s"
            failed = {rank: went_on for rank, s in enumerate(ended) if s is None}
        if failed:
            said = [
                f"Rank {rank} {how}, saying:\n"
                f"{words[rank].read_text(errors='replace')[-_WORDS:].strip() or '(nothing)'}"
                for rank, how in failed.items()
            ]
            raise WorkError("\n\n".join([f"{name} failed.", *said]))
        if None not in ended:
            return
        time.sleep(_POLL)


# -- the worker's side -----------------------------------------------------------------------------


def measure(function: Callable[[DeviceMesh], Mapping[str, float]]) -> NoReturn:
    """Measure in one of the processes that :func:`run_processes` started, and end it.

    Args:
        function: What measures, given all processes in a row; each calls it.
    """
    status = 1
    try:
        _measure(function)
        status = 0
    except BaseException:  # noqa: BLE001  also one that ends a program: the others would wait
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: as Python and torch take themselves down, threads of gloo may be left that
    # nobody joins any more, and C++ aborts the process for it ("terminate called without an active
    # exception"), although all of its work is done.
    os._exit(status)


def _measure(function: Callable[[DeviceMesh], Mapping[str, float]]) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    folder, rank = Path(os.environ[_FOLDER]), int(os.environ["RANK"])
    size = int(os.environ["WORLD_SIZE"])
    store = folder.joinpath("store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    found = function(init_device_mesh("cpu", (size,)))
    if not rank:
        beside = folder / f"{_FOUND}.new"
        beside.write_text(json.dumps(dict(found)))
        beside.replace(folder / _FOUND)
    dist.barrier()  # before it, another process may still be in need of this one


# -- comparisons -----------------------------------------------------------------------------------


class _Model(nn.Module):
    """Matrices with an odd number of rows, vectors, and a tensor of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 12)
        self.third = nn.Conv1d(3, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).tanh()).tanh()
        found: Tensor = self.third(hidden.unflatten(1, (3, 4))).flatten(1).clone()
        return found


def _batch(step: int) -> Tensor:
    del step  # the same in all of them
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _loss(output: Tensor) -> Tensor:
    return output.square().mean()


def gathered(model: nn.Module, optimizer: Any, twin: nn.Module, other: Any) -> None:
    """Carry the state of a sharded optimizer as a checkpoint does that holds all of it.

    Args:
        model: The sharded model.
        optimizer: Its optimizer.
        twin: Another such model, with the same parameters.
        other: Its optimizer, which gets the state.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_optimizer_state_dict(twin, other, state, options=options)


@dataclass(frozen=True)
class Training:
    """A small training, in one process or in several that share each batch.

    Args:
        model: Makes the model, of float64 parameters when it is trained. Its second child is
            sharded apart from the rest.
        batch: The step, from 0, to its batch, of shape ``[row, *any]``; the rows are dealt out.
        loss: Output to loss: a mean over rows.
        steps: How many, before and after a checkpoint.
    """

    model: Callable[[], nn.Module] = _Model
    batch: Callable[[int], Tensor] = _batch
    loss: Callable[[Tensor], Tensor] = _loss
    steps: int = 3

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model, always with the same parameters."""
        torch.manual_seed(0)
        return self.model().to(dtype)

    def shard(self, mesh: DeviceMesh, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the model sharded by FSDP2."""
        from torch.distributed.fsdp import fully_shard

        model = self.build(dtype)
        fully_shard(list(model.children())[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def optimizer(self, make: Make, model: nn.Module) -> Any:
        """Return an optimizer of a model; generators that it makes have the same seed always."""
        torch.manual_seed(3)
        return make(model.parameters())

    def train(
        self, model: nn.Module, optimizer: Any, steps: Iterable[int] | None = None, *, split: bool
    ) -> None:
        """Take some steps.

        Args:
            model: The model, of whatever floating-point type.
            optimizer: Its optimizer.
            steps: Which; the first ones by default.
            split: Whether this process sees its own part of each batch, or all of it.
        """
        import torch.distributed as dist

        dtype = next(model.parameters()).dtype
        for step in range(self.steps) if steps is None else steps:
            rows = self.batch(step)
            if split:
                rows = rows.chunk(dist.get_world_size())[dist.get_rank()]
            optimizer.zero_grad()
            self.loss(model(rows.to(dtype) if rows.is_floating_point() else rows)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def compare(
        self, mesh: DeviceMesh, makes: Mapping[str, Make], *, carry: Carry = gathered
    ) -> dict[str, float]:
        """Return how far several processes are from one, for each of some optimizers.

        Args:
            mesh: The processes.
            makes: Names, and what makes an optimizer of parameters.
            carry: How a checkpoint carries the state of an optimizer to another process.

        Returns:
            Greatest differences: ``"moved, NAME"`` between start and end in one process,
            ``"ddp, NAME"`` and ``"fsdp2, NAME"`` between its parameters and those of replicas and
            shards, and ``"checkpoint, NAME"`` after as many steps more of other shards, which took
            over from the first.
        """
        found = {}
        for name, make in makes.items():
            later = range(self.steps, 2 * self.steps)
            single = self.build()
            start = _copies(single)
            optimizer = self.optimizer(make, single)
            self.train(single, optimizer, split=False)
            wanted = _copies(single)
            found[f"moved, {name}"] = distance(single, start)
            replica = nn.parallel.DistributedDataParallel(self.build())
            self.train(replica, self.optimizer(make, replica), split=True)
            found[f"ddp, {name}"] = distance(replica, wanted)
            shards, twin = self.shard(mesh), self.shard(mesh)
            ours, other = self.optimizer(make, shards), self.optimizer(make, twin)
            self.train(shards, ours, split=True)
            found[f"fsdp2, {name}"] = distance(shards, wanted)
            twin.load_state_dict(shards.state_dict())
            carry(shards, ours, twin, other)
            self.train(twin, other, later, split=True)
            self.train(single, optimizer, later, split=False)
            found[f"checkpoint, {name}"] = distance(twin, single.parameters())
        return found

    def half(self, mesh: DeviceMesh, make: Make, reference: Make | None = None) -> float:
        """Return how far one step of bfloat16 shards is from one of float64 in one process.

        Args:
            mesh: The processes.
            make: Makes the optimizer.
            reference: Makes that of the one process, if it is to be another.

        Raises:
            AssertionError: If the state of the shards is not of float32.
        """
        shards, single = self.shard(mesh, torch.bfloat16), self.build()
        optimizer = self.optimizer(make, shards)
        self.train(shards, optimizer, range(1), split=True)
        states = optimizer.state.values()
        kinds = {x.dtype for state in states for x in state.values() if isinstance(x, Tensor)}
        require(kinds == {torch.float32}, f"the state is of {kinds}")
        self.train(single, self.optimizer(reference or make, single), range(1), split=False)
        return distance(shards, single.parameters())


def placed(mesh: DeviceMesh, make: Make, placement: Placement, *, beside: bool = False) -> float:
    """Return how far a matrix that is placed in some way gets from one that is not, in three steps.

    Args:
        mesh: The processes.
        make: Makes the optimizer.
        placement: That of parameter and gradient: ``Shard(1)`` for columns, as tensor parallelism
            has them. With ``Partial()`` the gradient is in parts that are yet to be added.
        beside: Whether there is a tensor of the usual kind in the same optimizer.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    weight, gradient = (
        torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    reference = nn.Parameter(weight.clone())
    if isinstance(placement, Partial):
        where: Placement = Replicate()
        share = 0.25 / (dist.get_world_size() - 1) if dist.get_rank() else 0.75
        given: Tensor = DTensor.from_local(gradient * share, mesh, [placement])
    else:
        where, given = placement, distribute_tensor(gradient, mesh, [placement])
    parameter = nn.Parameter(distribute_tensor(weight, mesh, [where]))
    for p, g in ((reference, gradient), (parameter, given)):
        others = [nn.Parameter(torch.ones(3, dtype=torch.float64))] if beside else []
        optimizer = make([p, *others])
        for _ in range(3):
            p.grad = g
            for other in others:
                other.grad = torch.ones_like(other)
            optimizer.step()
    return float((whole(parameter) - reference).detach().abs().max())


def distance(model: nn.Module, reference: Iterable[Tensor]) -> float:
    """Return the greatest difference between the parameters of a model and others.

    Args:
        model: A model, sharded or not.
        reference: Whole tensors, in the order of its parameters.
    """
    pairs = zip(model.parameters(), reference, strict=True)
    return max(float((whole(a) - b).detach().abs().max()) for a, b in pairs)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a DTensor; any other tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
