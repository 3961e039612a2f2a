"""Hugging Face's Trainer on a small Llama that learns to count modulo 23, in padded batches.

python examples/hf_causal_lm.py
"""

import tempfile

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gpdfx

SIZE, LENGTH, PAD, IGNORED = 23, 12, 23, -100


def sequence(start: int, step: int, length: int) -> list[int]:
    """``start``, then ``step`` more each time, modulo ``SIZE``."""
    return [(start + step * k) % SIZE for k in range(length)]


def sample(start: int, step: int) -> dict[str, Tensor]:
    """One sequence, padded at its end; the model shifts the labels itself."""
    length = LENGTH - (start + step) % 4
    tokens = torch.tensor(sequence(start, step, length) + [PAD] * (LENGTH - length))
    held = torch.arange(LENGTH) < length
    labels = tokens.where(held, torch.tensor(IGNORED))
    return {"input_ids": tokens, "attention_mask": held.long(), "labels": labels}


def main() -> None:
    torch.manual_seed(0)
    student = LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": SIZE + 1, "hidden_size": 32, "intermediate_size": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD},
        )
    )
    data = [sample(start, step) for start in range(SIZE) for step in (1, 2, 3)]
    held_out, data = data[::7], [one for k, one in enumerate(data) if k % 7]
    batch = {name: torch.stack([one[name] for one in data[:2]]) for name in data[0]}
    del batch["labels"]
    gpd = gpdfx.GPD(student, ratio=2, example_kwargs=batch)  # the loss is the model's own
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=30,
            per_device_train_batch_size=16,
            bf16=True,
            use_cpu=True,
            remove_unused_columns=False,  # the GPD takes whatever the student does
            report_to="none",
            disable_tqdm=True,
        )
        groups = gpdfx.param_groups(gpd, 0.01)  # in which norms and scales do not decay
        adam = torch.optim.AdamW(groups, lr=1e-2)
        trainer = Trainer(gpd, arguments, train_dataset=data, optimizers=(adam, None))
        trainer.train()
        assert trainer.evaluate(held_out)["eval_loss"] < 10  # of teacher, student and gap
        gpd.collapse().save_pretrained(folder)
        plain = LlamaForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            want = gpd.eval().student(**batch).logits
            torch.testing.assert_close(plain(**batch).logits, want, rtol=1e-4, atol=1e-4)
        loss = Trainer(plain, arguments, eval_dataset=held_out).evaluate()["eval_loss"]
    prompts = torch.tensor([sequence(start, 2, 4) for start in (1, 8, 15)])
    found = plain.generate(prompts, max_new_tokens=8, do_sample=False)
    right = found == torch.tensor([sequence(start, 2, 12) for start in (1, 8, 15)])
    assert right.float().mean() > 0.9, found
    print(f"loss {loss:.2f}, counts on: {found[0].tolist()}")


if __name__ == "__main__":
    main()
