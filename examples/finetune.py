"""Fine-tune a trained network: torchcrepe's tiny pitch tracker, whose weights come with its wheel.

It hears the pitch of clean tones; of tones in noise it learns here. Its forward ends with a sigmoid
for each of 360 bins of 20 cents: ``logits=`` undoes it.

python examples/finetune.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchcrepe
from torch import Tensor, nn

import gpdfx

STEPS, BATCH, RATE, FIRST, BINS = 40, 32, 16000, 1997.3794084376191, 20.0


def tones(count: int, seed: int, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    """Tones of 65 to 1000 Hz with overtones, (count, 1024) normalized, and their bins of pitch."""
    draw = torch.Generator().manual_seed(seed)
    pitch = 65 * (1000 / 65) ** torch.rand(count, 1, generator=draw)
    time, phase = torch.arange(1024) / RATE, 6.28 * torch.rand(count, 1, generator=draw)
    tone = sum(torch.sin(k * (6.2832 * pitch * time + phase)) / k for k in (1, 2, 3))
    tone = tone + noise * torch.randn(count, 1024, generator=draw)
    tone = (tone - tone.mean(1, keepdim=True)) / tone.std(1, keepdim=True)
    cents = 1200 * torch.log2(pitch.squeeze(1) / 10)
    return tone, ((cents - FIRST) / BINS).round().long()


def near(logits: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy with a bell around the true bin, as the network was trained."""
    distance = torch.arange(logits.shape[1]) - bins.unsqueeze(1)
    return F.cross_entropy(logits, (-(distance**2) / 2).float().softmax(1))


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """How often the pitch of tones in noise is right to half a semitone (50 cents)."""
    x, bins = tones(500, seed=1)
    return ((network.eval()(x).argmax(1) - bins).abs() * BINS <= 50).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    student = torchcrepe.Crepe("tiny")
    weights = Path(torchcrepe.__file__).parent / "assets" / "tiny.pth"
    student.load_state_dict(torch.load(weights, weights_only=True))
    before = accuracy(student)
    x, _ = tones(2, seed=2)
    gpd = gpdfx.GPD(
        student,
        ratio=1.5,
        example_inputs=(x,),
        criterion=near,
        logits=lambda probability: probability.logit(1e-6),
    )
    optimizer = torch.optim.AdamW(gpdfx.param_groups(gpd, 0.01), lr=2e-4)
    for step in range(STEPS):
        out = gpd(*tones(BATCH, seed=100 + step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    plain = gpd.collapse()
    with torch.no_grad():
        student = gpd.eval().student(x)
        torch.testing.assert_close(plain.eval()(x), student, rtol=1e-4, atol=1e-5)
    after = accuracy(plain)
    assert after > before + 0.1, (before, after)
    print(f"pitch in noise: {before:.1%} before, {after:.1%} after {STEPS} steps")


if __name__ == "__main__":
    main()
