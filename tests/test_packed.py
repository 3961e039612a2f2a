"""Packed sequences: recurrent layers on them widen, for any lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gpdfx


class Tagger(nn.Module):
    """A tag for every word of sentences of several lengths."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = kind(6, 5, **options)
        self.first = options.get("batch_first", False)
        self.tag = nn.Linear(options.get("proj_size", 5) * (1 + self.layers.bidirectional), 3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(words if self.first else words.T)
        given = pack_padded_sequence(x, lengths, self.first, enforce_sorted=False)
        found = pad_packed_sequence(self.layers(given)[0], self.first)[0]
        y: Tensor = self.tag(found)
        return y


class Summary(Tagger):
    """The last states, beside the mean of what was found at the steps there are."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(words)
        given = pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False)
        packed, state = self.layers(given)
        found, counts = pad_packed_sequence(packed, True, total_length=words.shape[1])
        both = found.sum(1) / counts[:, None] + torch.cat(tuple(state[-2:]), -1)
        y: Tensor = self.tag(both)
        return y


class Between(Tagger):
    """A layer on the packed steps, residual to what is padded; states are handed on."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM, batch_first=True)
        self.inner, self.second = nn.Linear(5, 6), nn.LSTM(6, 5, batch_first=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(words)
        given = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        packed, state = self.layers(given)
        inner = packed._replace(data=self.inner(packed.data).relu() + given.data)
        found, _ = pad_packed_sequence(self.second(inner, state)[0], True)
        y: Tensor = self.tag(found) + self.tag(pad_packed_sequence(packed, True)[0])
        return y


class Masked(Tagger):
    """Lengths make a mask, too."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        found = super().forward(words, lengths)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return (found * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


class Sorted(Tagger):
    """What is given is packed already."""

    def forward(self, given: PackedSequence) -> Tensor:  # type: ignore[override]
        x = PackedSequence(self.embed(given.data), given.batch_sizes)
        y: Tensor = self.tag(self.layers(x)[0].data)
        return y


KINDS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Tagger(nn.LSTM),
    "lstm_projected": lambda: Tagger(nn.LSTM, proj_size=4, num_layers=2, batch_first=True),
    "gru_both_ways": lambda: Tagger(nn.GRU, bidirectional=True, batch_first=True),
    "rnn_dropping": lambda: Tagger(nn.RNN, num_layers=2, dropout=0.3, nonlinearity="relu"),
    "summary": lambda: Summary(nn.GRU, bidirectional=True, batch_first=True),
    "between": Between,
    "masked": lambda: Masked(nn.LSTM, batch_first=True),
}
WORDS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([3, 7, 1, 5])
OTHERS = ((WORDS.flip(0), torch.tensor([7, 7, 2, 4])), (WORDS[:2, :4], torch.tensor([2, 4])))


@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences_widen(name: str) -> None:
    torch.manual_seed(0)
    model = KINDS[name]()
    teacher = gpdfx.expand(model, 2, example_inputs=(WORDS, LENGTHS), branches=None)
    report = teacher.report()
    assert not report.apart
    assert not report.bridged
    assert report.widened == 1
    for given in ((WORDS, LENGTHS), *OTHERS):
        torch.testing.assert_close(teacher.eval()(*given), model.eval()(*given))
    teacher.train()(WORDS, LENGTHS).sum().backward()
    plain = gpdfx.collapse(teacher)
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))


class Descending(Tagger):
    """Sentences are sorted by their lengths."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        given = pack_padded_sequence(self.embed(words), lengths, True)
        y: Tensor = self.tag(pad_packed_sequence(self.layers(given)[0], True)[0])
        return y


def test_the_batch_of_sorted_sequences_is_free() -> None:
    torch.manual_seed(0)
    model, lengths = Descending(nn.LSTM, batch_first=True), torch.tensor([7, 5, 4, 1])
    teacher = gpdfx.expand(model, 2, example_inputs=(WORDS, lengths), branches=None)
    assert teacher.report().widened == 1
    for given in ((WORDS[:2], lengths[:2]), (WORDS[:3, :5], torch.tensor([5, 5, 2]))):
        torch.testing.assert_close(teacher.eval()(*given), model.eval()(*given))


class Listed(Tagger):
    """Lengths that are numbers: there are as many as the batch has samples."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(words, lengths.tolist())  # type: ignore[arg-type]


def test_lengths_in_a_list_leave_the_batch_free() -> None:
    torch.manual_seed(0)
    model = Listed()
    teacher = gpdfx.expand(model, 2, example_inputs=(WORDS, LENGTHS), branches=None)
    assert teacher.report().apart
    for given in ((WORDS, LENGTHS), *OTHERS):
        torch.testing.assert_close(teacher.eval()(*given), model.eval()(*given))


def test_a_network_is_given_packed_sequences() -> None:
    torch.manual_seed(0)
    model = Sorted(nn.GRU)
    given = pack_padded_sequence(WORDS.T, LENGTHS.sort(descending=True)[0])
    teacher = gpdfx.expand(model, 2, example_inputs=(given,), branches=None)
    assert teacher.report().widened == 1
    other = pack_padded_sequence(WORDS.T[:4, :2], torch.tensor([4, 3]))
    for packed in (given, other):
        torch.testing.assert_close(teacher.eval()(packed), model.eval()(packed))
