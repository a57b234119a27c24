"""What is measured in several processes: it is said what went wrong, at once, and where."""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path

import pytest

from kexue.core import WorkError
from kexue.core.conformance.distributed import has_gloo, run_processes

gloo = pytest.mark.skipif(not has_gloo(), reason="torch is built without gloo")


def worker(tmp_path: Path, code: str) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(code))
    return path


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@gloo
def test_returns_what_the_first_process_measured(tmp_path: Path) -> None:
    path = worker(
        tmp_path,
        """
        import torch
        import torch.distributed as dist
        from kexue.core.conformance.distributed import measure

        def ranks(mesh):
            total = torch.tensor(dist.get_rank() + 1.0)
            dist.all_reduce(total)
            threads = torch.get_num_threads()
            return {"rank": dist.get_rank(), "sum": total.item(), "processes": mesh.size(),
                    "threads": threads, "nan": float("nan")}

        measure(ranks)
        """,
    )
    found = run_processes(path, processes=3)
    assert found.pop("nan") != found["rank"]
    assert found == {"rank": 0, "sum": 6, "processes": 3, "threads": 1}


@gloo
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_raises_is_reported_and_ends_the_others(tmp_path: Path, rank: int) -> None:
    path = worker(
        tmp_path,
        f"""
        import os, sys, time
        from pathlib import Path
        import torch.distributed as dist
        from kexue.core.conformance.distributed import measure

        def fails(mesh):
            Path(sys.argv[0]).with_name(f"{{dist.get_rank()}}.pid").write_text(str(os.getpid()))
            dist.barrier()
            if dist.get_rank() == {rank}:
                print("as it was said")
                raise ValueError("seven is odd")
            time.sleep(600)

        measure(fails)
        """,
    )
    begin = time.monotonic()
    with pytest.raises(WorkError) as caught:
        run_processes(path)
    assert time.monotonic() - begin < 120
    message = str(caught.value)
    assert f"Rank {rank} ended with exit status 1" in message
    assert "as it was said" in message
    assert "ValueError: seven is odd" in message
    assert f"Rank {1 - rank}" not in message
    assert all(gone(int((tmp_path / f"{r}.pid").read_text())) for r in range(2))


def test_a_process_that_is_stuck_is_given_up(tmp_path: Path) -> None:
    path = worker(
        tmp_path,
        """
        import os, time
        if os.environ["RANK"] == "1":
            print("here it ends", flush=True)
            time.sleep(600)
        """,
    )
    with pytest.raises(WorkError) as caught:
        run_processes(path, timeout=2)
    message = str(caught.value)
    assert "Rank 1 did not end within 2 s" in message
    assert "here it ends" in message
    assert "Rank 0" not in message


def test_a_process_without_words_is_reported(tmp_path: Path) -> None:
    path = worker(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(WorkError, match=r"Rank 0 ended with exit status -9, saying:\n\(nothing\)"):
        run_processes(path, processes=1)


def test_a_worker_that_measures_nothing_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"^worker.py must call measure"):
        run_processes(worker(tmp_path, ""), processes=1)


@gloo
def test_an_optimizer_that_is_wrong_in_shards_is_found(tmp_path: Path) -> None:
    """One whose steps are of the norm of the shard, and one whose state is not carried over."""
    path = worker(
        tmp_path,
        """
        import torch
        from torch.distributed.tensor import Shard
        from kexue.core.conformance.distributed import Training, measure, placed

        class Local(torch.optim.Optimizer):
            def __init__(self, params):
                super().__init__(params, {"lr": 0.1})

            @torch.no_grad()
            def step(self, closure=None):
                for p in self.param_groups[0]["params"]:
                    part, g = (x.to_local() if hasattr(x, "to_local") else x for x in (p, p.grad))
                    part.sub_(0.1 * g / (g.norm() + 1e-3))
                    self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)

        def distances(mesh):
            try:
                Training().half(mesh, Local)
            except AssertionError as error:
                half = float("bfloat16" in str(error))
            sgd = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
            training = Training()
            forgets = training.compare(mesh, {"sgd": sgd}, carry=lambda *given: None)
            return {**training.compare(mesh, {"local": Local}), "half": half,
                    "columns": placed(mesh, Local, Shard(1)),
                    "forgotten": forgets["checkpoint, sgd"], "fsdp2, sgd": forgets["fsdp2, sgd"]}

        measure(distances)
        """,
    )
    found = run_processes(path)
    assert found["moved, local"] > 1e-3
    assert found["ddp, local"] < 1e-14
    assert found["fsdp2, local"] > 1e-3
    assert found["columns"] > 1e-3
    assert found["forgotten"] > 1e-3
    assert found["fsdp2, sgd"] < 1e-14
    assert found["half"] == 1
