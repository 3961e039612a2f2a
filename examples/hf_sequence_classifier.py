"""Hugging Face's Trainer on a small BERT that tells which half of a text holds more of a token.

python examples/hf_sequence_classifier.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import gpdfx

SIZE, LENGTH, TOKEN = 8, 12, 3


def samples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts, and 1 where the second half has more of ``TOKEN`` than the first."""
    texts = torch.randint(SIZE, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    first, second = ((half == TOKEN).sum(1) for half in texts.chunk(2, 1))
    kept = first != second
    labels = (second > first).long()
    return [{"input_ids": x, "labels": y} for x, y in zip(texts[kept], labels[kept], strict=True)]


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_labels": 2},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LENGTH},
    )
    train, test = samples(1500, 0), samples(300, 1)
    x, y = (torch.stack([one[name] for one in test]) for name in ("input_ids", "labels"))
    example = {"input_ids": x[:2], "attention_mask": torch.ones_like(x[:2])}
    gpd = gpdfx.GPD(BertForSequenceClassification(config), ratio=2, example_kwargs=example)
    for one in train:
        one["attention_mask"] = torch.ones(LENGTH, dtype=torch.long)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=4,
            per_device_train_batch_size=25,
            learning_rate=3e-3,
            use_cpu=True,
            remove_unused_columns=False,  # the GPD takes whatever the student does
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(gpd, arguments, train_dataset=train).train()
        gpd.collapse().save_pretrained(folder)
        plain = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        call = {"input_ids": x, "attention_mask": torch.ones_like(x)}
        student, logits = gpd.eval().student(**call).logits, plain(**call).logits
    torch.testing.assert_close(logits, student, rtol=1e-4, atol=1e-4)
    accuracy = (logits.argmax(1) == y).float().mean().item()
    assert accuracy > 0.85, accuracy
    print(f"student: {accuracy:.1%} of {len(y)} texts")


if __name__ == "__main__":
    main()
