"""Grow a Llama by two, and run the wide one in the class that it came from.

    python examples/grow_llama.py

What doubles: hidden size, intermediate size, heads. What stays: the size of a head, since rotary
embeddings turn pairs of its channels and attention is scaled by its root, and the vocabulary. So
the wide network is an ordinary Llama of another config. Two choices make it one: as many key heads
as query heads (with fewer, each layer either doubles these or has twice the queries for each, and
a config has one number for all layers), and embeddings that are not tied: the head sums over the
hidden size, of which every copy counts half, and the table that is looked up does not.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gpdfx

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    tie_word_embeddings=False,
    use_cache=False,  # the example call returns logits alone, and no cache of keys
)
small = LlamaForCausalLM(config).double().eval()
tokens = torch.randint(0, config.vocab_size, (2, 12))

# 1. the teacher, and what it is without gpdfx
teacher = gpdfx.expand(small, 2, example_inputs=(tokens,), branches=None, dynamic="batch")
weights = gpdfx.plain_teacher(teacher.eval()).state_dict()

# 2. the same weights in transformers' own class
wide_config = LlamaConfig.from_dict(config.to_dict())
wide_config.update({"hidden_size": 64, "intermediate_size": 128, "use_cache": True})
wide_config.update({"num_attention_heads": 8, "num_key_value_heads": 8})
wide = LlamaForCausalLM(wide_config).double().eval()
wide.load_state_dict(weights, strict=True)

# 3. a checkpoint as any other
with tempfile.TemporaryDirectory() as folder:
    wide.save_pretrained(folder)
    wide = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

with torch.no_grad():
    expected, logits = small(tokens).logits, wide(tokens).logits
    prompt, options = tokens[:, :4], {"max_new_tokens": 16, "do_sample": False}
    said, says = (net.generate(prompt, pad_token_id=0, **options) for net in (small, wide))
error = float((logits - expected).abs().max() / expected.abs().max())
sizes = [sum(p.numel() for p in net.parameters()) for net in (small, wide)]
print(
    f"parameters {sizes[0]:,} -> {sizes[1]:,}; logits differ by {error:.1e}; {says.shape[1]} tokens"
)
assert error < 1e-12, error
assert torch.equal(said, says), "another text"
assert torch.std(wide.lm_head.weight[:, :32] - wide.lm_head.weight[:, 32:]) > 0, "copies are alike"
