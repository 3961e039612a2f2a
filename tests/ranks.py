"""What several processes do together, each check a function; ``torchrun -m tests.ranks FOLDER``
runs those of a number of processes, and the first one writes what became of each."""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gpdfx
from gpdfx.teacher.module import Teacher

X, Y = torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.arange(8) % 4
EXACT = {"rtol": 0, "atol": 1e-10}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    """Its head has fewer rows than a shard is even for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1 = nn.Conv2d(3, 6, 3), nn.Sequential(Block(), Block())
        self.head, self.scale = nn.Linear(6, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer1(self.stem(x)).mean((2, 3))) * self.scale
        return y


@cache
def made(unshared: str) -> gpdfx.GPD:
    torch.manual_seed(0)
    options = {"example_inputs": (X.float(),), "verify": False, "dynamic": "batch"}
    gpd = gpdfx.GPD(Net(), unshared=[unshared] if unshared else [], **options)
    for name, p in gpd.teacher.named_parameters():
        if name.endswith(".scales"):  # branches that count
            p.data[1:] = torch.randn(p[1:].shape) / 8
    return gpd


def make(dtype: torch.dtype = torch.float64, unshared: str = "") -> gpdfx.GPD:
    return copy.deepcopy(made(unshared)).to(dtype)


# --------------------------------------------------------------------------- layouts
def shard(gpd: gpdfx.GPD, layout: str, **options: Any) -> gpdfx.GPD:
    """``blocks``: what is inside first."""
    if "blocks" in layout:
        for block in gpd.teacher.get_submodule("layer1"):  # type: ignore[attr-defined]
            fully_shard(block, **options)
        fully_shard([gpd.teacher.get_submodule(n) for n in ("stem", "head")], **options)
    if "teacher" in layout:
        fully_shard(gpd.teacher, **options)
    if "gpd" in layout:
        fully_shard(gpd, **options)
    return gpd


LAYOUTS = ("gpd", "teacher", "teacher gpd", "blocks gpd", "blocks teacher", "blocks")


def full(x: Any) -> Tensor:
    found: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return found


def same_grads(gpd: nn.Module, own: nn.Module, **close: float) -> None:
    expected = dict(own.named_parameters())
    assert any(p.grad is not None for p in expected.values())
    for name, p in gpd.named_parameters():
        assert (p.grad is None) == (expected[name].grad is None), name
        if p.grad is not None:
            found = full(p.grad) if isinstance(p.grad, DTensor) else mean(p.grad)
            torch.testing.assert_close(found, expected[name].grad, **(close or EXACT))
    gpd.zero_grad(), own.zero_grad()


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def mean(x: Tensor) -> Tensor:
    dist.all_reduce(x := x.detach().clone())
    return x / dist.get_world_size()


# --------------------------------------------------------------------------- fully_shard
def steps(layout: str) -> None:
    """Three steps are those of one process on all."""
    alone = steps_of(make(unshared="head.bias"), lambda x: x)
    together = steps_of(shard(make(unshared="head.bias"), layout), mine)
    torch.testing.assert_close(together, alone, **EXACT)


def steps_of(gpd: gpdfx.GPD, cut: Callable[[Tensor], Tensor]) -> list[Tensor]:
    found = []
    optimizer = torch.optim.SGD(gpd.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        terms = gpd(cut(X), cut(Y)).terms.values()
        loss = torch.stack([*terms]).sum()  # in float64
        loss.backward()
        found += [mean(loss), full(nn.utils.clip_grad_norm_(gpd.parameters(), 1.0)).detach()]
        optimizer.step()
        optimizer.zero_grad()
    return found + [full(p).detach() for p in gpd.parameters()]


def calls(layout: str) -> None:
    """Every call, with its gradients."""
    own, gpd = make(), shard(make(), layout)
    gpd(mine(X), mine(Y)).loss.backward()
    own(X, Y).loss.backward()
    same_grads(gpd, own)
    for pick in (
        lambda g: g.student,
        lambda g: g.teacher,
        lambda g: g.teacher.student,
        lambda g: g.teacher.both,
    ):
        results = []
        for net, x in ((gpd, mine(X)), (own, X)):
            y = pick(net)(x)
            y = torch.cat(y, 1) if isinstance(y, tuple) else y
            y.square().mean().backward()
            results.append(y.detach())
        torch.testing.assert_close(results[0], mine(results[1]), **EXACT)
        same_grads(gpd, own)
        with torch.no_grad():
            y = pick(gpd)(mine(X))
        y = torch.cat(y, 1) if isinstance(y, tuple) else y
        torch.testing.assert_close(y, results[0], **EXACT)


def first_calls(layout: str) -> None:
    """The student before anything else."""
    own, gpd = make(), shard(make(), layout)
    gpd.student(mine(X)).square().mean().backward()
    own.student(X).square().mean().backward()
    same_grads(gpd, own)
    gpd(mine(X), mine(Y)).loss.backward()
    own(X, Y).loss.backward()
    same_grads(gpd, own)


def states(layout: str) -> None:
    """Collapse, states both ways, files."""
    own, gpd = make(), shard(make(), layout)
    teacher: Teacher = gpd.teacher
    want = own.collapse().state_dict()
    path = Path(sys.argv[1]) / f"{layout}.safetensors"
    options = StateDictOptions(full_state_dict=True)
    for _ in range(2):
        for plain in (gpd.collapse(), gpdfx.collapse(teacher)):
            assert equal(plain.state_dict(), want)
        for state in (get_model_state_dict(teacher, options=options), teacher.state_dict()):
            assert equal(gpdfx.to_student(state, teacher), want)
        dist.barrier()
        if dist.get_rank() == 0:  # alone
            state = own.teacher.state_dict()
            assert equal(gpdfx.to_student(state, teacher), want)
        wide = gpdfx.to_teacher(want, teacher)
        assert equal(wide, gpdfx.to_teacher(want, own.teacher))
        gpdfx.save(teacher, path)
        dist.barrier()
        if layout == "blocks gpd":
            again = gpdfx.load(path, Net())
            assert equal(again.state_dict(), own.teacher.state_dict())
        gpd(mine(X), mine(Y)).loss.backward()  # the second time after what a step leaves


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def compiled() -> None:
    own, gpd = make(), shard(make(), "gpd")
    loss = torch.compile(gpd, backend="aot_eager")(mine(X), mine(Y)).loss
    torch.testing.assert_close(mean(loss), own(X, Y).loss)
    loss.backward()
    own(X, Y).loss.backward()
    same_grads(gpd, own)


def accumulated(layout: str) -> None:
    """Two batches, whose gradients are averaged once."""
    own, gpd = make(), shard(make(), layout)
    for k, half in enumerate((slice(0, 4), slice(4, 8))):
        root: Any = gpd if "gpd" in layout else gpd.teacher
        root.set_requires_gradient_sync(k == 1)
        gpd(mine(X[half]), mine(Y[half])).loss.backward()
        own(X[half], Y[half]).loss.backward()
    same_grads(gpd, own)


def frozen(layout: str) -> None:
    own, gpd = make(), make()
    for net in (own, gpd):
        for name, p in net.teacher.named_parameters():
            p.requires_grad_("layer1.0" not in name and "norm" not in name)
    shard(gpd, layout, reshard_after_forward=False)
    gpd(mine(X), mine(Y)).loss.backward()
    own(X, Y).loss.backward()
    same_grads(gpd, own)


def half(layout: str) -> None:
    """Forward and backward in another dtype, parameters and students in the first one."""
    own = make(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    gpd = shard(make(torch.float32), layout, mp_policy=policy)
    x = X.float()
    out, want = gpd(mine(x), mine(Y)), own(x, Y)
    assert out.teacher_logits.dtype is out.student_logits.dtype is torch.bfloat16
    torch.testing.assert_close(mean(out.loss), want.loss, rtol=0.02, atol=0.02)
    out.loss.backward()
    want.loss.backward()
    scale = max(float(p.grad.abs().max()) for p in own.parameters() if p.grad is not None)
    same_grads(gpd, own, rtol=0.1, atol=0.05 * scale)
    assert gpd.student(mine(x)).dtype is torch.bfloat16
    with torch.no_grad():
        gpd(mine(x), mine(Y))
    assert equal(gpd.collapse().state_dict(), own.collapse().state_dict())


# --------------------------------------------------------------------------- batch norms
class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer1.append(nn.BatchNorm2d(6))


def normed(synced: bool) -> gpdfx.GPD:
    torch.manual_seed(0)
    net: nn.Module = Normed()
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if synced else net
    options = {"example_inputs": (X.float(),), "dynamic": "batch"}
    return gpdfx.GPD(net, verify=synced, **options).double()


def averages() -> None:
    """Statistics of each process's own batches."""
    gpd = normed(False)
    ddp = DistributedDataParallel(gpd, broadcast_buffers=False)
    ddp(mine(X), mine(Y)).loss.backward()
    if dist.get_rank() == 0:  # alone
        gpd(mine(X), mine(Y))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            alone = gpd.collapse()
        assert ["layer1.2" in str(one.message) for one in told] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = dict(gpdfx.collapse(gpd.teacher, average=False).named_buffers())
        plain = gpd.collapse(average=True)
    assert equal(plain.state_dict(), first(plain.state_dict()))
    for name, x in plain.named_buffers():
        if x.is_floating_point():
            torch.testing.assert_close(x, mean(own[name]))
            assert not torch.equal(x, own[name])
        else:
            assert int(x) == 2
    if dist.get_rank() == 0:
        assert equal(dict(alone.named_parameters()), dict(plain.named_parameters()))


def first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first process's."""
    states = [state]
    dist.broadcast_object_list(states)
    return states[0]


class OnCpu:
    """What kernels of PyTorch compute, which there are for GPUs alone."""

    @staticmethod
    def apply(
        x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, eps: Any, momentum: Any, *group: Any
    ) -> Tensor:
        dims, shape = [d for d in range(x.ndim) if d != 1], [-1, *[1] * (x.ndim - 2)]
        n = x.numel() // x.shape[1] * group[1]
        middle = all_reduce(x.sum(dims), group=group[0]) / n
        x = x - middle.view(shape)
        square = all_reduce(x.square().sum(dims), group=group[0]) / n
        with torch.no_grad():
            mean.lerp_(middle, momentum), var.lerp_(square * n / (n - 1), momentum)
        factor = weight * (square + eps).rsqrt()
        return x * factor.view(shape) + bias.view(shape)

    @classmethod
    @contextmanager
    def instead(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.modules.batchnorm, "sync_batch_norm", cls)
            patch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
            yield


def synced() -> None:
    """A batch norm over all processes is one over one batch, in the teacher and the student."""
    own, gpd = normed(False), normed(True)
    for net in (gpd, gpd.teacher):
        with pytest.raises(gpdfx.InputError) as caught:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)
        assert "convert_sync_batchnorm(model)" in str(caught.value.remedy)
    with pytest.raises(gpdfx.InputError, match="no SyncBatchNorm on cpu"):
        copy.deepcopy(gpd)(mine(X), mine(Y))
    if dist.get_rank() == 0:  # waits for nobody
        normed(True)
    for _ in range(2):
        with OnCpu.instead():
            terms = gpd(mine(X), mine(Y)).terms
        want = own(X, Y).terms
        torch.testing.assert_close({k: mean(v) for k, v in terms.items()}, want, **EXACT)
        for found in (terms, want):
            torch.stack([*found.values()]).sum().backward()
        same_grads(gpd, own)
        torch.testing.assert_close(dict(gpd.named_buffers()), dict(own.named_buffers()), **EXACT)
    gpd.eval(), own.eval()
    x = mine(X)
    torch.testing.assert_close(gpd.teacher(x), own.teacher(x), **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = gpd.collapse()
    assert isinstance(plain.get_submodule("layer1.2"), nn.SyncBatchNorm)
    torch.testing.assert_close(plain(x), gpd.student(x), **EXACT)


# --------------------------------------------------------------------------- checkpoints
def checkpoint() -> None:
    """What any number of processes saved, any other number reads."""
    folder = Path(sys.argv[1])
    gpd = shard(make(), "blocks gpd")
    if dist.get_world_size() == 2:
        optimizer = torch.optim.SGD(gpd.parameters(), lr=0.1)
        gpd(mine(X), mine(Y)).loss.backward()
        optimizer.step()
        dcp.save({"gpd": get_model_state_dict(gpd)}, checkpoint_id=folder / "dcp")
        state = {k: full(v) for k, v in gpd.state_dict().items()}
        if dist.get_rank() == 0:
            torch.save(state, folder / "state.pt")
        return
    state = {"gpd": get_model_state_dict(gpd)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    gpd.load_state_dict(state["gpd"])
    want = torch.load(folder / "state.pt")
    assert equal({k: full(v) for k, v in gpd.state_dict().items()}, want)


# --------------------------------------------------------------------------- run
CHECKS = steps, calls, first_calls, states, accumulated, frozen, half


def checks(count: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Those of a number of processes, by name."""
    if count == 2:
        for layout in LAYOUTS:
            few = layout in ("teacher gpd", "blocks")
            for check in (calls, states) if few else CHECKS:
                yield f"{check.__name__}: {layout}", partial(check, layout)
        yield "compiled", compiled
        yield "averages", averages
        yield "synced", synced
    yield "checkpoint", checkpoint


def main() -> None:
    torch.manual_seed(0)
    X.copy_(torch.randn(X.shape, dtype=X.dtype))
    dist.init_process_group("gloo")
    init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    for name, check in checks(dist.get_world_size()):
        if only not in name:
            continue
        failed = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check()
        except Exception:
            failed = traceback.format_exc()
            if only:
                print(dist.get_rank(), failed, flush=True)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, failed)
        results[name] = "\n".join(filter(None, every))
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
        print({k: v.strip().splitlines()[-1][:150] if v else "" for k, v in results.items()})
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of PyTorch's own sometimes abort a process that ends as usual


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
