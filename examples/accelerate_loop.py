"""Accelerate: two processes, bfloat16, accumulation, clipping, and a saved state.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

import tempfile

import digits
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.data import DataLoader

import gpdfx

EPOCHS = 6


def main() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    set_seed(0)
    train, x, y = digits.load()
    gpd = gpdfx.GPD(digits.cnn(), ratio=2, example_inputs=(x[:2],))
    optimizer = torch.optim.AdamW(gpdfx.param_groups(gpd, 0.01), lr=0.01)
    loader = DataLoader(train, 25, shuffle=True)
    model, optimizer, loader = accelerator.prepare(gpd, optimizer, loader)
    for _ in range(EPOCHS):
        for images, classes in loader:
            with accelerator.accumulate(model):
                out = model(images, classes)
                accelerator.backward(out.loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    gpd = accelerator.unwrap_model(model)
    with torch.no_grad():
        student = gpd.eval().student(x)
    if accelerator.is_main_process:
        digits.check("student", gpd.collapse(), student, x, y)
    with tempfile.TemporaryDirectory() as own:
        (folder,) = broadcast_object_list([own])  # the first process's
        accelerator.save_state(folder)
        accelerator.wait_for_everyone()
        with torch.no_grad():
            next(gpd.parameters()).zero_()
        accelerator.load_state(folder)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # whose statistics of batch norms all have now
        with torch.no_grad():
            torch.testing.assert_close(gpd.student(x), student)
    accelerator.end_training()


if __name__ == "__main__":
    main()
