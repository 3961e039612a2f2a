"""A plain loop: autocast to bfloat16, gradient accumulation, clipping, an average of the weights.

python examples/plain_loop.py
"""

import digits
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import gpdfx

EPOCHS, ACCUMULATE = 5, 2


def main() -> None:
    train, x, y = digits.load()
    loader = DataLoader(train, 25, shuffle=True, generator=torch.Generator().manual_seed(0))
    gpd = gpdfx.GPD(digits.cnn(), ratio=2, example_inputs=(x[:2],))
    averages = AveragedModel(gpd, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    optimizer = torch.optim.SGD(gpdfx.param_groups(gpd, 1e-4), lr=0.05, momentum=0.9)
    steps = EPOCHS * len(loader) // ACCUMULATE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(EPOCHS):
        for k, (images, classes) in enumerate(loader, 1):
            with torch.autocast("cpu", torch.bfloat16):
                out = gpd(images, classes)
            (out.loss / ACCUMULATE).backward()
            if k % ACCUMULATE == 0:
                torch.nn.utils.clip_grad_norm_(gpd.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                averages.update_parameters(gpd)
    for name, trained in (("student", gpd), ("averaged student", averages)):
        with torch.no_grad():
            student = getattr(trained, "module", trained).eval().student(x)
        digits.check(name, gpdfx.collapse(trained), student, x, y)


if __name__ == "__main__":
    main()
