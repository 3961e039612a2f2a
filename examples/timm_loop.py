"""timm: its optimizer with layer decay, Mixup, and its moving average, on a model of its zoo.

python examples/timm_loop.py
"""

import digits
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

import gpdfx

EPOCHS = 7


def settings(optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> dict[str, tuple]:
    """Each parameter's weight decay and factor of the learning rate."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    of = {name: groups[id(p)] for name, p in network.named_parameters()}
    return {name: (group["weight_decay"], group["lr_scale"]) for name, group in of.items()}


def main() -> None:
    train, x, y = digits.load()
    torch.manual_seed(0)
    student = timm.models.MlpMixer(
        **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10},
        **{"num_blocks": 2, "embed_dim": 48},
    )
    gpd = gpdfx.GPD(student, ratio=2, example_inputs=(x[:2],), criterion=SoftTargetCrossEntropy())
    options = {"opt": "adamw", "lr": 5e-3, "weight_decay": 0.05, "layer_decay": 0.8}
    optimizer = create_optimizer_v2(gpd, **options)
    ours, own = settings(optimizer, gpd.teacher), create_optimizer_v2(student, **options)
    assert {name: ours[name] for name, _ in student.named_parameters()} == settings(own, student)
    loader = DataLoader(train, 50, shuffle=True, generator=torch.Generator().manual_seed(0))
    schedule = CosineLRScheduler(optimizer, EPOCHS * len(loader), t_in_epochs=False)
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=0, label_smoothing=0.05, num_classes=10)
    averages, step = ModelEmaV3(gpd, decay=0.95), 0
    for _ in range(EPOCHS):
        for images, classes in loader:
            soft_images, soft_classes = mixup(images, classes)
            out = gpd(soft_images, soft_classes)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            step += 1
            schedule.step_update(step)
            averages.update(gpd, step)
    for name, trained, own in (("student", gpd, gpd), ("average", averages, averages.module)):
        with torch.no_grad():
            student = own.eval().student(x)
        plain = gpdfx.collapse(trained)
        assert type(plain) is timm.models.MlpMixer
        digits.check(name, plain, student, x, y)
        print(f"loss {F.cross_entropy(student, y):.3f}")


if __name__ == "__main__":
    main()
