"""One small network per op: it widens losslessly, and without a bridge where a rule promises so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from benchmarks import networks

Step = Callable[[Tensor], Tensor]

# Each maps an image (B, 8, 6, 6), whose channels widen, to a tensor that still depends on them.
FREE: dict[str, Step] = {
    "conv1d": lambda x: F.conv1d(x.flatten(2), W["1d"], padding=1),
    "conv3d": lambda x: F.conv3d(x[:, :, None], W["3d"], padding=(0, 1, 1)),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x.flatten(2), W["1d"], groups=1),
    "conv_transpose2d, groups": lambda x: F.conv_transpose2d(x, W["grouped"], groups=2),
    "conv_transpose3d": lambda x: F.conv_transpose3d(x[:, :, None], W["3d"]),
    "conv1d over positions": lambda x: F.conv1d(x.mean(3).transpose(1, 2), W["6x6"]),
    "conv2d along one dimension": lambda x: F.conv2d(
        x.transpose(1, 3), W["6x6"][..., None].expand(-1, -1, 3, -1), padding=(1, 0)
    ),
    "conv3d between two": lambda x: F.conv3d(x[:, None], W["1d"][:, :1, None, :, None]),
    "bilinear": lambda x: F.bilinear(x.mean((2, 3)), x.amax((2, 3)), W["bilinear"]),
    "einsum, implicit": lambda x: torch.einsum("bchw,oc", x, W["linear"]),
    "einsum, three operands": lambda x: torch.einsum(
        "bchw,oc,oc->bohw", x, W["linear"], W["linear"]
    ),
    "matmul over space": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "bmm": lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)) @ x.flatten(2),
    "baddbmm": lambda x: torch.baddbmm(
        x.flatten(2), x.flatten(2), x.new_ones(x.shape[0], 36, 36), alpha=0.1
    ),
    "addmm": lambda x: torch.addmm(x.mean((2, 3)), x.mean((2, 3)), W["linear"]),
    "softmax over channels": lambda x: x.softmax(1),
    "log_softmax over channels": lambda x: x.log_softmax(1),
    "local response": lambda x: x / (1 + x.square().mean(1, keepdim=True)).sqrt(),
    "layer_norm, channels last": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)),
    "group_norm": lambda x: F.group_norm(x, 4),
    "instance_norm": F.instance_norm,
    "weight standardisation": lambda x: F.conv2d(x, _standard(W["2d"]), padding=1),
    "weight_norm": lambda x: F.conv2d(
        x, torch._weight_norm(W["2d"], W["linear"].square().mean(1)[:, None, None, None] + 1)
    ),
    "weight_norm of all": lambda x: F.conv2d(
        x, torch._weight_norm(W["2d"], W["linear"].square().mean() + 1, -1)
    ),
    "all, from behind": lambda x: x[:, -8:] * 2,
    "an empty slice": lambda x: torch.cat([x, x[:, 8:]], 1),
    "var_mean": lambda x: sum(torch.var_mean(x, 1, keepdim=True), x),
    "std, several": lambda x: x / x.std((1, 2, 3), keepdim=True),
    "norm 1": lambda x: x / x.norm(p=1, dim=1, keepdim=True),
    "norm inf": lambda x: x / x.norm(p=float("inf"), dim=1, keepdim=True),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "adaptive pools": lambda x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2),
    "lp_pool": lambda x: F.lp_pool2d(x.abs() + 0.1, 2, 2),
    "max_pool, indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "pads": lambda x: F.pad(F.pad(x, (1, 1, 2, 0), "reflect"), (1, 0, 0, 0), "replicate"),
    "circular pad": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "tensor unfold": lambda x: x.unfold(2, 2, 2).mean(-1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bicubic": lambda x: F.interpolate(x, (9, 7), mode="bicubic", align_corners=True),
    "antialias": lambda x: F.interpolate(x, (4, 3), mode="bilinear", antialias=True),
    "grid_sample": lambda x: F.grid_sample(
        x, x.mean((1, 2, 3))[:, None, None, None].expand(-1, 3, 3, 2), align_corners=False
    ),
    "cat and stack": lambda x: torch.cat([torch.stack([x, -x], 2).flatten(1, 2), x], 1),
    "split sizes": lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "tensor_split": lambda x: torch.cat(x.tensor_split(3, 1), 1),
    "tensor_split at": lambda x: torch.cat(x.tensor_split((2, 5), 1), 1),
    "slice": lambda x: x[:, 2:7] - x[:, 1:2].tanh(),
    "negative slice": lambda x: x[:, -4:],
    "select of space": lambda x: x[:, :, 0] + x[..., -1],
    "unbind of space": lambda x: sum(x.unbind(2)),
    "expand": lambda x: x.mean((2, 3))[:, :, None].expand(-1, 8, 5),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(3, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat_interleave, its size said": lambda x: x.repeat_interleave(2, 1, output_size=16),
    "repeat_interleave of space": lambda x: x.repeat_interleave(2, 2, output_size=12),
    "repeat_interleave, pooled": lambda x: x.mean((2, 3)).repeat_interleave(3, -1, output_size=24),
    "swapaxes, movedim": lambda x: x.swapaxes(1, 3).movedim(-1, 1).transpose(0, 1).transpose(0, 1),
    "cumsum of space": lambda x: x.cumsum(2) / 6,
    "cumprod of space": lambda x: x.tanh().cumprod(3),
    "fft of space": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(6, 6)),
    "fft of one dimension": lambda x: torch.fft.fft(x, dim=2).abs(),
    "complex": lambda x: torch.view_as_real(torch.fft.fft(x.mean(3))).flatten(2),
    "roll and flip of space": lambda x: x.roll((1, 2), (2, 3)).flip(2),
    "cdist": lambda x: torch.cdist(x.flatten(2), x.flatten(2)),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.5], dtype=x.dtype)),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "attention over channels": lambda x: F.scaled_dot_product_attention(*[x.flatten(2)] * 3),
    "rotary": lambda x: _rotary(x.flatten(2).transpose(1, 2).unflatten(2, (2, 4))).flatten(2),
    "autocast region": lambda x: _autocast(x),
    "no_grad region": lambda x: x * _detached(x),
    "where and masks": lambda x: torch.where(x > 0, x, x * 0.1).masked_fill(x > 2, 2.0),
    "clamp by tensors": lambda x: x.clamp(x.amin(1, keepdim=True) * 0.5, x.amax(1, True) * 0.5),
    "lerp, addcmul": lambda x: torch.lerp(x, x.tanh(), 0.3).addcmul(x, x, value=0.1),
    "max of two": lambda x: torch.maximum(x, x.roll(1, 2)),
    "scatter_add of space, in place": lambda x: x.new_zeros(x.shape[0], 8, 3, 6).scatter_add_(
        2, TAKEN[:, None, :, None].expand(x.shape[0], 8, 6, 6), x
    ),
    "scatter_reduce of space, in place": lambda x: torch.full_like(x, -9.0).scatter_reduce_(
        3, TAKEN[:, None, None].expand(x.shape[0], 8, 6, 6), x, "amax", include_self=False
    ),
    "index_add of space": lambda x: x.index_add(2, TAKEN[0], x, alpha=0.5),
    "index_copy, index_fill of space": lambda x: x.index_copy(
        3, TAKEN[0, 3:], x[..., :3] * 2
    ).index_fill(2, TAKEN[0, :1], 0.5),
    "index_reduce of space": lambda x: x.index_reduce(3, TAKEN[0], x * 2, "amax"),
    "powers, in place": lambda x: (x.abs() + 1).pow_(0.5) + (x.abs() + 1).float_power(-1).to(x),
    "gather of space": lambda x: x.gather(2, x.new_zeros(x.shape[0], 8, 2, 6, dtype=torch.long)),
    "index of space": lambda x: x[:, :, torch.tensor([0, 2, 2])],
    "dropout": nn.Dropout(0.3),
    "dropout of channels": nn.Dropout2d(0.3),
    "dropout of channels, in place": nn.Sequential(nn.Tanh(), nn.Dropout2d(0.3, inplace=True)),
    "alpha dropout": nn.AlphaDropout(0.3),
    "alpha dropout of channels": nn.FeatureAlphaDropout(0.3),
    "random slopes": nn.RReLU(),
    "dropout in eval mode, too": lambda x: F.dropout(x.transpose(1, 3), 0.3),
    "alpha dropout in another order": lambda x: F.alpha_dropout(x.transpose(1, 3), 0.3, True),
    "position table": lambda x: x + W["table"][torch.arange(36) % 4].T.unflatten(1, (6, 6)),
}
# Positions along the channels matter: exact by way of the student's width.
NARROWED: dict[str, Step] = {
    "sort": lambda x: x.sort(1)[0],
    "cumsum": lambda x: x.cumsum(1),
    "as_strided": lambda x: (  # of a tensor in another memory order than it seems
        x.transpose(1, 3).contiguous().transpose(1, 3).as_strided((x.shape[0], 8, 20), (288, 1, 8))
    ),
    "topk": lambda x: x.topk(3, 1)[0],
    "argmax": lambda x: x + x.argmax(1, keepdim=True),
    "prod": lambda x: x.tanh().prod(1, keepdim=True) + x,
    "norm 0": lambda x: x - torch.linalg.vector_norm(x, 0, 1, keepdim=True),
    "causal attention": lambda x: F.scaled_dot_product_attention(
        *[x.flatten(2)] * 3, is_causal=True
    ),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.permute(0, 2, 3, 1)[:, :4], 2),
    "fft": lambda x: torch.fft.fft(x, dim=1).abs(),
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "overlapping slices": lambda x: x[:, 1:] - x[:, :-1],
    "stepped slice": lambda x: x[:, ::2],
    "select": lambda x: x - x[:, 3:4].mean(1, True) * x[:, 2][:, None],
    "gather": lambda x: x.gather(1, x.new_zeros(x.shape[0], 3, 6, 6, dtype=torch.long)),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "channel window": lambda x: F.avg_pool1d(x.mean((2, 3))[:, None], 3, 1, 1),
    "histogram-like": lambda x: x.median(1, keepdim=True)[0] + x,
}
W: dict[str, Tensor] = {}
TAKEN = torch.tensor([[0, 2, 2, 1, 0, 2]])


def _standard(w: Tensor) -> Tensor:
    variance, mean = torch.var_mean(w, (1, 2, 3), keepdim=True)
    return (w - mean) / (variance + 1e-3).sqrt()


def _rotary(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * torch.tensor([1.0, 0.1]).to(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x, W["2d"], padding=1)


def _detached(x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.conv2d(x, W["2d"], padding=1).sigmoid()


class Around(nn.Module):
    """A convolution, the step (which may use the weights), and a layer that reads everything."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        sizes = {
            **{"1d": (8, 8, 3), "2d": (8, 8, 3, 3), "3d": (8, 8, 1, 3, 3)},
            **{
                "6x6": (6, 6, 1),
                "grouped": (8, 4, 3, 3),
                "bilinear": (5, 8, 8),
                "linear": (8, 8),
                "table": (4, 8),
            },
        }
        self.weights = nn.ParameterDict({k: nn.Parameter(torch.randn(s)) for k, s in sizes.items()})
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        W.update(self.weights)
        x = self.stem(x)
        return self.head(torch.cat([self.step(x).flatten(1), x.flatten(1)], 1))


@pytest.mark.parametrize("name", [*FREE, *(f"narrowed {n}" for n in NARROWED)])
def test_op(name: str) -> None:
    torch.manual_seed(0)
    narrowed = name.startswith("narrowed ")
    step = NARROWED[name.removeprefix("narrowed ")] if narrowed else FREE[name]
    model, x = Around(step), torch.randn(2, 3, 6, 6)
    model(x)
    report = gpdfx.expand(model, 1.5, example_inputs=(x,), dynamic="batch").report()
    assert not [b for b in report.bridged if "rule failed" in b.reason]
    assert any("stem.weight" in group.parameters for group in report.groups), report
    assert bool(report.bridged) == narrowed, report


def test_experts_in_one_product() -> None:
    """Hugging Face's grouped matrix product: rows by expert, a weight for each."""
    pytest.importorskip("transformers")
    model, args, kwargs = networks.build("transformers:MixtralForCausalLM", 0)
    report = gpdfx.expand(
        model, 1.5, example_inputs=args, example_kwargs=kwargs, dynamic="batch"
    ).report()
    assert report.widened == 1.0
    assert not report.bridged
