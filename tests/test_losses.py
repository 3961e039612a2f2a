"""Losses against references written another way: loops over samples and classes, in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpdfx import InputError
from gpdfx.distill.features import Features, FitNet, Fusion, ReviewKD, hierarchical_context_loss
from gpdfx.distill.losses import DKD, KD, soft_cross_entropy


def draw(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def rows(x):
    """(N, C, ...) -> the class vectors, as lists of floats."""
    return x.movedim(1, -1).reshape(-1, x.shape[1]).tolist()


def softmax(row, temperature=1.0):
    powers = [math.exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# --------------------------------------------------------------------------- soft cross entropy
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (2, 3, 4, 5)])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (1.0, 0.1), (3.0, 0.25)])
def test_soft_cross_entropy_is_the_sum_over_classes(shape, temperature, smoothing):
    z, t = draw(*shape), draw(*shape, seed=1)
    losses = []
    for ours, theirs in zip(rows(z), rows(t), strict=True):
        q = [(1 - smoothing) * p + smoothing / shape[1] for p in softmax(theirs, temperature)]
        logs = [math.log(p) for p in softmax(ours, temperature)]
        losses.append(-sum(a * b for a, b in zip(q, logs, strict=True)))
    expected = temperature**2 * sum(losses) / len(losses)
    got = soft_cross_entropy(z, t, temperature=temperature, smoothing=smoothing)
    assert got.shape == ()
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_a_certain_teacher_gives_hard_labels_and_full_smoothing_forgets_the_teacher():
    z, target = draw(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    certain = 1000 * F.one_hot(target, 5).double()
    for smoothing in (0.0, 0.1):
        hard = F.cross_entropy(z, target, label_smoothing=smoothing)
        torch.testing.assert_close(soft_cross_entropy(z, certain, smoothing=smoothing), hard)
    uniform = -z.log_softmax(1).mean()
    torch.testing.assert_close(soft_cross_entropy(z, draw(6, 5, seed=1), smoothing=1.0), uniform)


def test_soft_cross_entropy_has_gradients_in_both():
    z, t = draw(3, 4, 2).requires_grad_(), draw(3, 4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: soft_cross_entropy(a, b, temperature=2.0, smoothing=0.1), (z, t)
    )


# --------------------------------------------------------------------------- KD
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (4.0, 0.9)])
def test_kd_is_the_divergence(shape, temperature, weight):
    z, t = draw(*shape), draw(*shape, seed=1)
    pairs = [
        kl(softmax(theirs, temperature), softmax(ours, temperature))
        for ours, theirs in zip(rows(z), rows(t), strict=True)
    ]
    got = KD(temperature, weight)(z, t, torch.tensor([0]))
    assert got.shape == ()
    assert got.item() == pytest.approx(weight * temperature**2 * sum(pairs) / len(pairs), rel=1e-12)
    if len(shape) == 2:
        theirs = F.kl_div(
            (z / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="batchmean"
        )
        torch.testing.assert_close(got, weight * temperature**2 * theirs)


@pytest.mark.parametrize("loss", [KD(), KD(1.0, 2.0), DKD(), DKD(2.0, 8.0, 4.0)])
def test_equal_logits_have_no_loss_and_no_gradient(loss):
    t, targets = draw(5, 7), torch.tensor([0, 3, 6, 2, 2])
    z = (t + draw(5, 1, seed=1)).requires_grad_()  # a constant per sample does not matter
    value = loss(z, t, targets)
    value.backward()
    assert abs(value.item()) < 1e-13
    assert z.grad.abs().max() < 1e-13
    assert loss(z + draw(5, 7, seed=2), t, targets) > 0.01


@pytest.mark.parametrize("loss", [KD(3.0), DKD(1.0, 2.0, 3.0)])
def test_logit_losses_have_the_students_gradient_and_no_other(loss):
    z, t = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    targets = torch.tensor([0, 4, 2, 1])
    assert torch.autograd.gradcheck(lambda a: loss(a, t.detach(), targets), (z,))
    loss(z, t, targets).backward()
    assert z.grad.abs().max() > 0
    assert t.grad is None


# --------------------------------------------------------------------------- DKD
def decoupled(z, t, targets, temperature):
    """Means of TCKD and NCKD over the samples, and each sample's own with its 1 - p_t."""
    each = []
    for ours, theirs, target in zip(rows(z), rows(t), targets.tolist(), strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        p_rest, q_rest = 1 - p[target], 1 - q[target]
        tckd = kl([p[target], p_rest], [q[target], q_rest])
        nckd = kl(
            [v / p_rest for c, v in enumerate(p) if c != target],
            [v / q_rest for c, v in enumerate(q) if c != target],
        )
        each.append((tckd, nckd, p_rest))
    return np.array(each)


@pytest.mark.parametrize("parameters", [(1.0, 0.5, 1.0), (1.0, 2.0, 1.0), (0.3, 8.0, 4.0)])
def test_dkd_is_its_two_parts(parameters):
    z, t, targets = draw(6, 5), draw(6, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    alpha, beta, temperature = parameters
    tckd, nckd, _ = decoupled(z, t, targets, temperature).mean(0)
    got = DKD(*parameters)(z, t, targets)
    assert got.shape == ()
    assert got.item() == pytest.approx(temperature**2 * (alpha * tckd + beta * nckd), rel=1e-12)


def test_the_parts_of_dkd_make_up_kd():
    """KL = TCKD + (1 - p_t) NCKD, sample by sample: equation 7 of arXiv 2203.08679."""
    z, t, targets = draw(6, 5), draw(6, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    rest = 1 - t.softmax(1)
    for k in range(6):
        one = (z[k : k + 1], t[k : k + 1], targets[k : k + 1])
        tckd, nckd = DKD(1.0, 0.0)(*one), DKD(0.0, 1.0)(*one)
        whole = tckd + rest[k, targets[k]] * nckd
        torch.testing.assert_close(whole, KD(1.0, 1.0)(*one), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(DKD(1.0, rest[k, targets[k]].item())(*one), whole)


def test_dkd_takes_the_largest_of_soft_targets():
    z, t, targets = draw(4, 5), draw(4, 5, seed=1), torch.tensor([0, 4, 2, 1])
    mixed = 0.7 * F.one_hot(targets, 5) + 0.3 * F.one_hot(targets.flip(0), 5)
    assert DKD()(z, t, mixed) == DKD()(z, t, targets) == DKD()(z, t, targets.int())
    assert DKD()(z, t, targets.flip(0)) != DKD()(z, t, targets)


def test_dkd_of_logits_that_are_far_apart_is_finite():
    """1 - p_t is zero in float32; its logarithm is not."""
    z = torch.tensor([[0.0, 200.0, 1.0]], requires_grad=True)
    t = torch.tensor([[150.0, 0.0, 3.0]])
    value = DKD()(z, t, torch.tensor([0]))
    value.backward()
    p = softmax([0.0, 3.0])  # KL against log q = (0, -199)
    nckd = p[0] * math.log(p[0]) + p[1] * (math.log(p[1]) + 199)
    assert value.item() == pytest.approx(200 + 0.5 * nckd, rel=1e-6)
    assert z.grad.isfinite().all()


def test_dkd_glinesin_its_warmup():
    assert [DKD(warmup=4).ramp(epoch) for epoch in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert DKD().ramp(0) == 1.0


@pytest.mark.parametrize("loss", [soft_cross_entropy, KD(), DKD()])
def test_half_precision_logits_are_compared_in_single(loss):
    z, t, targets = draw(4, 5).bfloat16(), draw(4, 5, seed=1).bfloat16(), torch.arange(4)
    rest = () if loss is soft_cross_entropy else (targets,)
    half, single = loss(z, t, *rest), loss(z.float(), t.float(), *rest)
    assert half.dtype == torch.float32
    assert half == single


# --------------------------------------------------------------------------- refusals of logits
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: soft_cross_entropy(draw(4, 5), draw(4, 6)), r"\(4, 5\).*\(4, 6\)"),
        (lambda: soft_cross_entropy(draw(5), draw(5)), r"\(5,\)"),
        (lambda: soft_cross_entropy(draw(4, 5), draw(4, 5), smoothing=1.5), "smoothing is 1.5"),
        (lambda: soft_cross_entropy(draw(4, 5), draw(4, 5), smoothing=-0.1), "smoothing is -0.1"),
        (lambda: soft_cross_entropy(draw(4, 5), draw(4, 5), temperature=0.0), "temperature is 0"),
        (lambda: KD()(draw(4, 5), draw(1, 5), torch.arange(4)), r"\(4, 5\).*\(1, 5\)"),
        (lambda: KD(temperature=-1.0), "temperature is -1"),
        (lambda: DKD(temperature=0.0), "temperature is 0"),
        (lambda: DKD()(draw(4, 5, 2), draw(4, 5, 2), torch.arange(4)), "DKD of logits"),
        (lambda: DKD()(draw(4, 1), draw(4, 1), torch.zeros(4).long()), "DKD of logits"),
        (lambda: DKD()(draw(4, 5), draw(4, 5), torch.rand(4)), "DKD of targets.*float32"),
        (lambda: DKD()(draw(4, 5), draw(4, 5), torch.arange(3)), r"DKD of targets \(3,\)"),
        (lambda: DKD()(draw(4, 5), draw(4, 5), torch.rand(4, 6)), r"DKD of targets \(4, 6\)"),
    ],
)
def test_what_logit_losses_refuse(call, match):
    with pytest.raises(InputError, match=match) as error:
        call()
    assert error.value.remedy


# --------------------------------------------------------------------------- collecting features
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh())
        self.pair, self.named, self.unused, self.empty = Pair(), Named(), nn.Identity(), Empty()
        self.alias = self.stem

    def forward(self, x):
        x = self.stage(self.stem(x))
        self.empty(x)
        return self.named(self.pair(x)[1])["x"]


class Pair(nn.Module):
    def forward(self, x):
        return None, x + 1


class Named(nn.Module):
    def forward(self, x):
        return {"sizes": [], "x": (x * 2,)[0]}


class Empty(nn.Module):
    def forward(self, x):
        return {"n": 1}


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_features_come_in_the_order_of_the_names():
    model, x = Net(), torch.randn(2, 3, 8, 8)
    with Features(model, ["named", "stem", "stage.0", "pair", "alias"]) as seen:
        out = model(x)
    stem = model.stem(x)
    inner = model.stage[0](stem)
    expected = [out, stem, inner, inner.tanh() + 1, stem]
    for got, want in zip(seen.tensors, expected, strict=True):
        torch.testing.assert_close(got, want)
        assert got.requires_grad
    assert hooks(model) == 0


def test_features_see_functional_calls_and_the_last_call():
    model, x = Net(), torch.randn(2, 3, 8, 8)
    other = {k: torch.randn_like(p).requires_grad_() for k, p in model.named_parameters()}
    with Features(model, ["stem"]) as seen:
        model(x)
        torch.func.functional_call(model, other, (x,))
    expected = F.conv2d(x, other["stem.weight"], other["stem.bias"], padding=1)
    torch.testing.assert_close(seen.tensors[0], expected)
    (grad,) = torch.autograd.grad(seen.tensors[0].sum(), other["stem.bias"])
    assert grad.tolist() == [2 * 64] * 4


def test_features_leave_no_hooks_after_an_error_and_forget_on_reentry():
    model = Net()
    seen = Features(model, ["stem", "stage"])
    assert hooks(model) == 0
    with pytest.raises(RuntimeError), seen:
        model(torch.randn(2, 5, 8, 8))
    assert hooks(model) == 0
    with seen:
        assert hooks(model) == 2
        model(torch.randn(2, 3, 8, 8))
    assert len(seen.tensors) == 2
    with seen:
        pass
    with pytest.raises(InputError, match="not called: 'stem', 'stage'"):
        _ = seen.tensors
    assert hooks(model) == 0


def test_what_features_refuse():
    model, x = Net(), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="no module is called 'stagee'") as error:
        Features(model, ["stem", "stagee"])
    assert "stage" in error.value.remedy
    with Features(model, ["stem", "unused"]) as seen:
        model(x)
    with pytest.raises(InputError, match="not called: 'unused'"):
        _ = seen.tensors
    with pytest.raises(InputError, match="'empty' returns no tensor"), Features(model, ["empty"]):
        model(x)
    assert hooks(model) == 0


# --------------------------------------------------------------------------- the context loss
def pooled(x, lines, columns):
    """Averages over the cells that floor and ceil of equal parts bound."""
    h, w = x.shape[-2:]
    out = np.empty((*x.shape[:2], lines, columns))
    for i in range(lines):
        for j in range(columns):
            top, bottom = i * h // lines, -(-(i + 1) * h // lines)
            left, right = j * w // columns, -(-(j + 1) * w // columns)
            out[..., i, j] = x[..., top:bottom, left:right].mean((-2, -1))
    return out


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((9, 7), [(4, 4), (2, 2), (1, 1)]),
        ((8, 8), [(4, 4), (2, 2), (1, 1)]),
        ((4, 4), [(2, 2), (1, 1)]),
        ((3, 3), [(2, 2), (1, 1)]),
        ((6, 2), [(4, 2), (2, 2), (1, 1)]),
        ((6, 3), [(4, 3), (2, 2), (1, 1)]),
        ((2, 2), [(1, 1)]),
        ((1, 1), []),
    ],
)
def test_hcl_is_the_weighted_mean_over_the_pyramid(size, levels):
    a, b = draw(2, 3, *size), draw(2, 3, *size, seed=1)
    terms = [np.mean((a.numpy() - b.numpy()) ** 2)]
    terms += [np.mean((pooled(a.numpy(), *g) - pooled(b.numpy(), *g)) ** 2) for g in levels]
    weights = [0.5**k for k in range(len(terms))]
    expected = np.dot(weights, terms) / sum(weights)
    assert hierarchical_context_loss(a, b).item() == pytest.approx(expected, rel=1e-12)


def test_hcl_has_the_right_gradient():
    a, b = draw(1, 2, 5, 5).requires_grad_(), draw(1, 2, 5, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: hierarchical_context_loss(x, b), (a,))


# --------------------------------------------------------------------------- feature losses
STUDENT = [(4, 3, 8, 8), (4, 5, 4, 4), (4, 6, 2, 3)]
STATIC = [(4, 7, 8, 8), (4, 8, 8, 8), (4, 4, 5, 1)]


def features(shapes, seed):
    return [draw(*s, seed=seed + k).requires_grad_() for k, s in enumerate(shapes)]


def built(loss, student=STUDENT, static=STATIC):
    torch.manual_seed(0)
    loss.build(student, static)
    return loss.double()


@pytest.mark.parametrize("kind", [ReviewKD, FitNet])
def test_gradients_reach_parameters_and_student_features_only(kind):
    names = ["a", "b", "c"]
    loss = built(kind(names, names))
    ours, theirs = features(STUDENT, 0), features(STATIC, 10)
    value = loss(ours, theirs)
    assert value.shape == ()
    value.backward()
    for name, p in loss.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert all(x.grad.abs().max() > 0 for x in ours)
    assert all(x.grad is None for x in theirs)
    heavy = kind(names, names, weight=3.0)
    built(heavy).load_state_dict(loss.state_dict())
    torch.testing.assert_close(heavy(ours, theirs), 3 * value)


@pytest.mark.parametrize("kind", [ReviewKD, FitNet])
def test_feature_losses_train(kind):
    """Gradient steps on the parameters and the features bring the loss down."""
    loss = built(kind(["a", "b", "c"], ["x", "y", "z"]))
    ours, theirs = features(STUDENT, 0), features(STATIC, 10)
    optimizer = torch.optim.Adam([*loss.parameters(), *ours], lr=0.03)
    first = loss(ours, theirs).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(ours, theirs).backward()
        optimizer.step()
    assert loss(ours, theirs).item() < 0.7 * first


def test_fitnet_is_the_squared_distance_after_a_pointwise_map():
    shapes = [(2, 3, 4, 4), (2, 5, 3), (2, 6)], [(2, 4, 2, 2), (2, 5, 4), (2, 3)]
    loss = built(FitNet(["a", "b", "c"], ["a", "b", "c"], 2.0), *shapes)
    ours, theirs = (features(s, k) for k, s in enumerate(shapes))
    image, tokens, vector = loss.parts
    maps = [
        np.einsum("oi,nihw->nohw", image.weight.detach().numpy()[:, :, 0, 0], ours[0].detach()),
        np.einsum("oi,nli->nlo", tokens.weight.detach().numpy(), ours[1].detach()),
        np.einsum("oi,ni->no", vector.weight.detach().numpy(), ours[2].detach()),
    ]
    maps[0] = pooled(maps[0] + image.bias.detach().numpy()[:, None, None], 2, 2)
    maps[1] += tokens.bias.detach().numpy()
    maps[2] += vector.bias.detach().numpy()
    expected = 2 * sum(
        np.mean((a - b.detach().numpy()) ** 2) for a, b in zip(maps, theirs, strict=True)
    )
    assert loss(ours, theirs).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *xs: loss(list(xs), theirs), ours)


def normed(x):
    """Batch norm over the batch, with scale 1 and shift 0."""
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5)


def test_fusion_is_two_features_weighted_by_attention_maps():
    torch.manual_seed(0)
    fusion = Fusion(3, 5, 4, deepest=False).double()
    x, review = draw(2, 3, 4, 6), draw(2, 5, 2, 3, seed=1)
    u, output = fusion(x, review)
    inner = normed(np.einsum("oi,nihw->nohw", fusion.enter[0].weight[:, :, 0, 0].detach(), x))
    deep = review.numpy().repeat(2, axis=2).repeat(2, axis=3)  # nearest neighbour
    joined = np.concatenate([inner, deep], 1)
    logits = np.einsum("oi,nihw->nohw", fusion.attention.weight[:, :, 0, 0].detach(), joined)
    logits += fusion.attention.bias.detach().numpy()[:, None, None]
    maps = 1 / (1 + np.exp(-logits))
    expected = maps[:, :1] * inner + maps[:, 1:] * deep
    np.testing.assert_allclose(u.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    padded = np.pad(expected, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    conv = np.einsum("oiab,nihwab->nohw", fusion.leave[0].weight.detach().numpy(), windows)
    np.testing.assert_allclose(output.detach().numpy(), normed(conv), rtol=1e-9, atol=1e-11)


def test_reviewkd_goes_from_the_deepest_feature_to_the_first():
    names = ["a", "b", "c"]
    loss = built(ReviewKD(names, names, weight=2.0, width=9))
    ours, theirs = features(STUDENT, 0), features(STATIC, 10)
    c, out_c = loss.parts[2](ours[2], None)
    b, out_b = loss.parts[1](ours[1], c)
    _, out_a = loss.parts[0](ours[0], b)
    assert c.shape == (4, 9, 2, 3)
    assert b.shape == (4, 9, 4, 4)
    sized = [
        out_a,
        F.interpolate(out_b, size=(8, 8), mode="nearest"),
        torch.as_tensor(pooled(out_c.detach().numpy(), 5, 1)),
    ]
    expected = 2 * sum(hierarchical_context_loss(x, y) for x, y in zip(sized, theirs, strict=True))
    torch.testing.assert_close(loss(ours, theirs), expected)
    (grad,) = torch.autograd.grad(hierarchical_context_loss(out_a, theirs[0]), ours[2])
    assert grad.abs().max() > 0  # the deepest feature helps to match the first
    assert [p.attention is None for p in loss.parts] == [False, False, True]


def test_reviewkd_has_the_right_gradient():
    loss = built(ReviewKD(["a", "b"], ["a", "b"], width=2), [(2, 2, 3, 3), (2, 1, 2, 2)], STATIC_2)
    ours = features([(2, 2, 3, 3), (2, 1, 2, 2)], 0)
    theirs = features(STATIC_2, 10)
    assert torch.autograd.gradcheck(lambda *xs: loss(list(xs), theirs), ours)


STATIC_2 = [(2, 2, 3, 3), (2, 2, 1, 1)]


def test_width_follows_the_deepest_feature():
    wide = [(2, 4, 2, 2), (2, 600, 1, 1)]
    for width, shapes, expected in [(None, STUDENT, 6), (11, STUDENT, 11), (None, wide, 512)]:
        names = [str(k) for k in range(len(shapes))]
        loss = ReviewKD(names, names, width=width)
        loss.build(shapes, STATIC[: len(shapes)])
        assert {p.enter[0].out_channels for p in loss.parts} == {expected}


def test_collected_features_train_a_student():
    student, static, x = Net(), Net(), torch.randn(4, 3, 8, 8)
    layers = ["stem", "stage"]
    loss = ReviewKD(layers, layers)
    with Features(student, loss.student_layers) as ours, Features(static, layers) as theirs:
        student(x), static(x)
    loss.build([t.shape for t in ours.tensors], [t.shape for t in theirs.tensors])
    loss(ours.tensors, theirs.tensors).backward()
    assert student.stem.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in static.parameters())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: FitNet(["a"], []), "1 layers of the student and 0"),
        (lambda: ReviewKD([], []), "0 layers"),
        (lambda: FitNet("ab", ["a", "b"]), "one string"),
        (lambda: ReviewKD(["a"], ["a"])([draw(2, 3, 4, 4)], [draw(2, 3, 4, 4)]), "ReviewKD has no"),
        (lambda: FitNet(["a"], ["a"])([draw(2, 3)], [draw(2, 3)]), "FitNet has no parameters"),
        (lambda: ReviewKD(["a"], ["b"]).build([(2, 3, 4, 4)], [(2, 5, 6)]), r"\(2, 5, 6\) of 'b'"),
        (lambda: FitNet(["a"], ["b"]).build([(2, 3, 4, 4)], [(2, 5, 6)]), r"of 'a' against"),
        (lambda: FitNet(["a"], ["b"]).build([(2,)], [(2,)]), r"\(2,\) of 'a'"),
        (lambda: FitNet(["a"], ["b"]).build(STUDENT, STATIC), "3 features .* for 1 pairs"),
        (
            lambda: built(FitNet(["a"], ["b"]), *TOKENS)([draw(2, 3)] * 2, [draw(2, 3)]),
            "2 features",
        ),
        (
            lambda: built(FitNet(["a"], ["b"]), *TOKENS)([draw(2, 5, 3)], [draw(2, 6, 4)]),
            r"\(2, 5, 4\).*\(2, 6, 4\)",
        ),
        (
            lambda: built(ReviewKD(["a"], ["b"]), STUDENT[:1], STATIC[:1])(
                features(STUDENT[:1], 0), [draw(4, 1, 8, 8)]
            ),
            r"\(4, 7, 8, 8\).*\(4, 1, 8, 8\)",
        ),
    ],
)
def test_what_feature_losses_refuse(call, match):
    with pytest.raises(InputError, match=match) as error:
        call()
    assert error.value.remedy


TOKENS = [(2, 5, 3)], [(2, 5, 4)]
