"""Logits of tokens and maps: where the classes are, what counts, and losses of Hugging Face."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from gpdfx.distill.losses import DKD, KD, soft_cross_entropy
from gpdfx.distill.positions import CrossEntropy, find_class_dim, find_counts

V, T = 11, 7


class Tokens(nn.Module):
    """Token logits (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids).tanh())
        return logits


class Maps(nn.Module):
    """Logits (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.b(self.a(image).relu())
        return logits


def draw(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(0))


def moved(gpd: gpdfx.GPD) -> gpdfx.GPD:
    """With teacher and student apart."""
    with torch.no_grad():
        for p in gpd.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return gpd.eval()


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=3)


def padded(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=3)


def next_counts(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=3) != 3


CRITERIA: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "default": (None, lambda y: y != -100),
    "shifted": (shifted, next_counts),
    "padded": (padded, lambda y: y != 3),
}


@pytest.mark.parametrize("which", CRITERIA)
def test_tokens_have_their_classes_last(which: str) -> None:
    """Gap and KD against hand formulas, over positions that the criterion counts."""
    torch.manual_seed(0)
    criterion, counted = CRITERIA[which]
    ids, labels = draw(5, T), draw(5, T)
    labels[0, :3], labels[1] = (-100, 3) if which == "default" else (3, 3)
    options = {"example_inputs": (ids,), "verify": False, "branches": None}
    gpd = moved(gpdfx.GPD(Tokens(), Tokens(), criterion=criterion, kd=KD(2.0, 0.7), **options))
    out = gpd(ids, labels)
    counts = counted(labels)
    assert 0 < counts.sum() < counts.numel()
    soft = 0.9 * out.teacher_logits.softmax(-1) + 0.1 / V
    each = -(soft * out.student_logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(out.terms["gap"], 3.0 * each[counts].mean())
    theirs = (out.static_logits / 2).log_softmax(-1)
    divergence = (theirs.exp() * (theirs - (out.student_logits / 2).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(out.terms["student_kd"], 0.7 * 4 * divergence[counts].mean())
    if criterion is None:
        want = F.cross_entropy(out.student_logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(out.terms["student"], want)


@pytest.mark.parametrize("own", [False, True])
def test_maps_have_their_classes_in_dimension_1(own: bool) -> None:
    torch.manual_seed(0)
    ignored = 255 if own else -100

    def criterion(logits: Tensor, maps: Tensor) -> Tensor:
        return F.cross_entropy(logits, maps, ignore_index=255)

    x, maps = torch.randn(2, 3, 5, 5), torch.randint(0, 4, (2, 5, 5))
    maps[:, 1] = ignored
    options = {"example_inputs": (x,), "verify": False, "branches": None}
    gpd = moved(gpdfx.GPD(Maps(), criterion=criterion if own else None, **options))
    out = gpd(x, maps)
    soft = 0.9 * out.teacher_logits.softmax(1) + 0.1 / 4
    each = -(soft * out.student_logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(out.terms["gap"], 3.0 * each[maps != ignored].mean())
    out.loss.backward()


def test_what_does_not_count_may_be_nan() -> None:
    """As the rows of padding that attend to nothing are."""
    logits, soft = torch.randn(6, V), torch.randn(6, V)
    counts = torch.tensor([True, True, False, True, False, True])
    want = soft_cross_entropy(logits[counts], soft[counts], smoothing=0.1)
    logits[~counts] = soft[~counts] = math.nan
    logits.requires_grad_()
    got = soft_cross_entropy(logits, soft, smoothing=0.1, counts=counts)
    torch.testing.assert_close(got, want)
    got.backward()
    assert logits.grad is not None
    assert logits.grad[counts].any()
    assert not logits.grad[~counts].any()
    assert KD()(logits, soft, None, counts=counts).isfinite()
    assert not KD()(logits, soft, None, counts=torch.zeros(6, dtype=torch.bool)).any()


def test_unlabeled_samples_are_left_out() -> None:
    """Of classification, as cross entropy leaves them out; also by DKD."""
    logits, static, y = torch.randn(6, 5), torch.randn(6, 5), torch.randint(0, 5, (6,))
    y[2:4] = -100
    counts = find_counts(F.cross_entropy, logits, y, 1)
    assert counts is not None
    assert counts.tolist() == [True, True, False, False, True, True]
    want = DKD()(logits[counts], static[counts], y[counts])
    torch.testing.assert_close(DKD()(logits, static, y, counts=counts), want)
    assert find_counts(F.cross_entropy, logits, y.float().softmax(0), 1) is None


def test_rows_that_a_criterion_leaves_out() -> None:
    """Of logits (N, C) too; a margin that is met is none of them."""
    logits, y = 9 * torch.eye(5)[[0, 1, 2, 3]], torch.tensor([0, 1, 3, 4])

    def ignores(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, ignore_index=3)

    counts = find_counts(ignores, logits, y, 1)
    assert counts is not None
    assert counts.tolist() == [True, True, False, True]
    counts = find_counts(F.multi_margin_loss, logits, y, 1)
    assert counts is not None
    assert counts.all()
    smooth = partial(F.cross_entropy, label_smoothing=0.1, ignore_index=3)
    counts = find_counts(smooth, logits, y, 1)
    assert counts is not None
    assert counts.tolist() == [True, True, False, True]
    assert find_counts(F.mse_loss, logits, torch.randn(4, 5), 1) is None


def test_logits_without_classes() -> None:
    """One number a sample: the task's loss is computed, the gap is refused."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0))
    x, y = torch.randn(5, 4), torch.rand(5)
    loss = F.binary_cross_entropy_with_logits
    gpd = gpdfx.GPD(model, lam=0.0, criterion=loss, example_inputs=(x,), verify=False)
    out = gpd(x, y)
    torch.testing.assert_close(out.terms["student"], loss(out.student_logits, y))
    gpd.lam = 1.0
    with pytest.raises(gpdfx.InputError, match=r"give both as \(N, C\)"):
        gpd(x, y)


def test_without_a_gap_there_need_be_no_classes() -> None:
    """A map of depths, say."""
    torch.manual_seed(0)
    x, depth = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    options = {"example_inputs": (x,), "verify": False, "branches": None, "criterion": F.mse_loss}
    gpd = gpdfx.GPD(Maps(), lam=0.0, **options)
    out = gpd(x, depth)
    torch.testing.assert_close(out.terms["student"], F.mse_loss(out.student_logits, depth))
    gpd.lam = 1.0
    with pytest.raises(gpdfx.InputError, match="class_dim="):
        gpd(x, depth)


def test_where_targets_do_not_tell_the_gradient_does() -> None:
    """As many classes as positions."""
    logits, labels = torch.randn(2, 5, 5), torch.randint(0, 5, (2, 5))
    assert find_class_dim(padded, logits, labels) == 2
    assert find_class_dim(F.cross_entropy, logits, labels) == 1
    assert find_class_dim(padded, logits, {"labels": labels}["labels"]) == 2
    with pytest.raises(gpdfx.InputError, match="class_dim="):
        find_class_dim(CrossEntropy(), logits, labels)
    gpd = gpdfx.GPD(Tokens(), example_inputs=(draw(2, V),), class_dim=-1, verify=False)
    gpd(draw(2, V), draw(2, V)).loss.backward()


def test_counts_of_ones_own_and_compiled() -> None:
    ids, labels = draw(4, T), draw(4, T)
    options = {"example_inputs": (ids,), "verify": False, "branches": None, "criterion": shifted}
    torch.manual_seed(0)
    found = moved(gpdfx.GPD(Tokens(), **options))
    want = found(ids, labels)
    found.counts = next_counts
    torch.testing.assert_close(found(ids, labels).loss, want.loss)
    found.counts = None
    with torch.inference_mode():
        torch.testing.assert_close(found(ids, labels).loss, want.loss)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels).loss, want.loss)


# --------------------------------------------------------------------------- Hugging Face
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def test_a_causal_lm_needs_no_criterion() -> None:
    """Its own loss shifts the labels; what it ignores counts neither there nor in the gap."""
    lm, ids = llama(), draw(3, T)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 4:], mask[0, 4:] = -100, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    gpd = gpdfx.GPD(lm, example_kwargs=batch, branches=None, verify=False).eval()
    out = gpd({**batch, "labels": labels})
    torch.testing.assert_close(out.terms["student"], lm(**batch, labels=labels).loss)
    torch.testing.assert_close(out.student_logits, lm(**batch).logits)
    counts = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
    soft = 0.9 * out.teacher_logits.softmax(-1) + 0.1 / V
    each = -(soft * out.student_logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(out.terms["gap"], 3.0 * each[counts].mean())
    torch.testing.assert_close(gpd(**batch, labels=labels).loss, out.loss)
    torch.testing.assert_close(gpd(batch, labels).loss, out.loss)
    for twin in (copy.deepcopy(gpd), pickle.loads(pickle.dumps(gpd))):
        torch.testing.assert_close(twin(batch, labels).loss, out.loss)
    with pytest.raises(gpdfx.InputError, match="labels"):
        gpd(batch)
    for held in (gpd, gpd.teacher):
        with pytest.raises(AttributeError, match=r"gpdfx\.collapse\(\.\.\.\)\.generate"):
            held.generate(ids)
        with pytest.raises(AttributeError, match=r"no attribute 'generat'$"):
            _ = held.generat
    plain = gpd.collapse()
    assert plain.generate(ids[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_a_classifier_needs_no_criterion() -> None:
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.utils import find_labels

    assert find_labels(gpdfx.GPD) == ["labels"]  # without which Trainer.evaluate has no loss

    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=3)
    torch.manual_seed(0)
    bert, ids, y = (
        BertForSequenceClassification(config).eval(),
        draw(4, T),
        torch.tensor([0, 1, 2, 1]),
    )
    options = {"branches": None, "verify": False}
    gpd = gpdfx.GPD(bert, example_kwargs={"input_ids": ids}, **options).eval()
    out = gpd(input_ids=ids, labels=y)
    torch.testing.assert_close(out.terms["student"], bert(input_ids=ids, labels=y).loss)
    with_labels = {"input_ids": ids, "labels": y}
    gpd = gpdfx.GPD(bert, example_kwargs=with_labels, **options).eval()
    torch.testing.assert_close(gpd(**with_labels).loss, out.loss)


def test_labels_that_were_tried_say_nothing_of_others() -> None:
    """The kind of problem is found by the first real labels: several classes at once, here."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=3)
    bert, ids = BertForSequenceClassification(config).eval(), draw(4, T)
    y = torch.randint(0, 2, (4, 3)).float()
    gpd = gpdfx.GPD(bert, example_kwargs={"input_ids": ids}, branches=None, verify=False).eval()
    assert bert.config.problem_type is None
    out = gpd(input_ids=ids, labels=y)
    torch.testing.assert_close(out.terms["student"], bert(input_ids=ids, labels=y).loss)


def test_a_loss_that_is_not_known_is_not_made_up() -> None:
    """T5's labels are not shifted, whatever its class is registered for."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    t5, ids = T5ForConditionalGeneration(config).eval(), draw(3, T)
    batch = {"input_ids": ids, "decoder_input_ids": draw(3, 5)}
    gpd = gpdfx.GPD(t5, example_kwargs=batch, branches=None, verify=False).eval()
    labels = draw(3, 5)
    want = t5(**batch, labels=labels).loss
    torch.testing.assert_close(gpd(**batch, labels=labels).terms["student"], want)


def test_another_structure_says_which_argument() -> None:
    lm, ids = llama(), draw(2, T)
    teacher = gpdfx.expand(lm, example_inputs=(ids,), branches=None, verify=False).eval()
    with pytest.raises(gpdfx.InputError, match=r"extra: labels"):
        teacher(ids, labels=ids)
    with pytest.raises(gpdfx.InputError, match=r"use_cache=False is not the example's None"):
        teacher(ids, use_cache=False)
    both = gpdfx.expand(lm, example_kwargs={"input_ids": ids, "attention_mask": ids}, verify=False)
    with pytest.raises(gpdfx.InputError, match=r"missing: attention_mask"):
        both(input_ids=ids)


def test_a_warning_names_what_no_optimizer_holds() -> None:
    ids = draw(2, T)
    options = {"example_inputs": (ids,), "branches": None, "verify": False}

    def step(optimizers: Callable[[gpdfx.GPD], list[torch.optim.Optimizer]]) -> None:
        gpd = gpdfx.GPD(Tokens(), **options)
        held = optimizers(gpd)
        gpd(ids, ids).loss.backward()
        for optimizer in held:
            optimizer.step()

    sgd = torch.optim.SGD
    with pytest.warns(UserWarning, match=r"no optimizer holds teacher\.head\.weight, teacher\.hea"):
        step(lambda gpd: [sgd(gpd.teacher.embedding.parameters(), 0.1)])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step(lambda gpd: [sgd(gpdfx.param_groups(gpd), 0.1)])
        step(
            lambda gpd: [
                sgd(gpd.teacher.embedding.parameters(), 0.1),
                sgd(gpd.teacher.head.parameters(), 0.1),
            ]
        )
    assert not [one for one in seen if "no optimizer holds" in str(one.message)]
