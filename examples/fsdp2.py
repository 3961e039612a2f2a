"""FSDP2, by layers and as a whole: save with DCP, and go on in another number of processes.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py save FOLDER
torchrun --standalone --nproc-per-node 3 examples/fsdp2.py resume FOLDER
"""

import sys

import digits
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import gpdfx

EPOCHS = 3


def main(what: str, folder: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    train, x, y = digits.load()
    gpd = gpdfx.GPD(digits.cnn(), ratio=2, example_inputs=(x[:2],))
    fully_shard(gpd, mesh=mesh)
    optimizer = torch.optim.AdamW(gpdfx.param_groups(gpd, 0.01), lr=0.01)
    if what == "resume":
        model, state = get_state_dict(gpd, optimizer)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(gpd, optimizer, model_state_dict=model, optim_state_dict=state)
    sampler = DistributedSampler(train)
    loader = DataLoader(train, 50 // dist.get_world_size(), sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, classes in loader:
            optimizer.zero_grad()
            gpd(images, classes).loss.backward()
            optimizer.step()
    model, state = get_state_dict(gpd, optimizer)
    if what == "save":
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    plain = gpdfx.collapse(gpd, average=True)  # of what is on all processes
    if dist.get_rank() == 0:
        found = digits.accuracy(plain, x, y)
        assert found > (0.9 if what == "resume" else 0.8), found
        print(f"{what}: {found:.1%} of {len(y)} digits")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
