"""DistributedDataParallel in two processes: equal to one process on the whole batch.

torchrun --standalone --nproc-per-node 2 examples/torchrun_ddp.py
"""

import copy

import digits
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import gpdfx

EPOCHS = 5


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    train, x, y = digits.load()
    gpd = gpdfx.GPD(digits.cnn(), ratio=2, example_inputs=(x[:2],))

    # One step on a batch in parts is the step on the whole: running statistics, which each process
    # has for itself, do not train in eval mode.
    alone, images, classes = copy.deepcopy(gpd).eval(), *train[: 8 * world]
    alone(images, classes).loss.backward()
    model = DistributedDataParallel(gpd.eval())  # needs no find_unused_parameters
    model(images[rank::world], classes[rank::world]).loss.backward()
    for (name, p), q in zip(gpd.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    model.zero_grad()

    sampler = DistributedSampler(train)
    loader = DataLoader(train, 25, sampler=sampler)
    optimizer = torch.optim.AdamW(gpdfx.param_groups(model, 0.01), lr=0.01)
    model.train()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, classes in loader:
            optimizer.zero_grad()
            model(images, classes).loss.backward()
            optimizer.step()
    with torch.no_grad():
        student = gpd.eval().student(x)
    if rank == 0:
        digits.check("student", gpdfx.collapse(model), student, x, y)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
