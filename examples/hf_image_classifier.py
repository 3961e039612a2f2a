"""Hugging Face's Trainer on a small ResNet.

python examples/hf_image_classifier.py
"""

import tempfile

import digits
import torch
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

import gpdfx


def right(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()}


def main() -> None:
    train, x, y = digits.load()
    torch.manual_seed(0)
    student = ResNetForImageClassification(
        ResNetConfig(
            **{"num_channels": 1, "num_labels": 10, "layer_type": "basic"},
            **{"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        )
    )
    data = [{"pixel_values": image, "labels": label} for image, label in train]
    gpd = gpdfx.GPD(student, ratio=2, example_kwargs={"pixel_values": x[:2]})

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=8,
            per_device_train_batch_size=25,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            use_cpu=True,
            remove_unused_columns=False,  # the GPD takes whatever the student does
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(gpd, arguments, train_dataset=data).train()
        gpd.collapse().save_pretrained(folder)
        plain = ResNetForImageClassification.from_pretrained(folder).eval()
        held_out = [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]
        found = Trainer(plain, arguments, eval_dataset=held_out, compute_metrics=right).evaluate()
    with torch.no_grad():
        student, logits = gpd.eval().student(x).logits, plain(x).logits
    torch.testing.assert_close(logits, student, rtol=1e-4, atol=1e-4)
    assert found["eval_accuracy"] > 0.85, found
    print(f"student: {found['eval_accuracy']:.1%}")


if __name__ == "__main__":
    main()
