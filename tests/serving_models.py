"""Small models and what `generate` writes with them, for the tests of the vLLM plugin."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tnl.models import TnlConfig, TnlForCausalLM

# Models this small are no quicker on several threads, which on a busy machine wait for each other at every step.
torch.set_num_threads(1)

NEW_TOKENS = 20
# Two ways of summing in float32 differ by some 1e-6 of the logits: a reference whose two best logits are closer than
# this decides nothing, and is not asked for.
SMALLEST_MARGIN = 1e-4
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.1,
    "pad_token_id": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


@dataclass(frozen=True)
class Reference:
    """A prompt and the tokens that `generate` continues it with, each alone in its batch."""

    prompt: list[int]
    tokens: list[int]


def save_tiny(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A TNL with random weights that writes varied text, and the byte tokenizer."""
    from tnl.training.tokenizer import byte_tokenizer

    torch.manual_seed(seed)
    TnlForCausalLM(TnlConfig(**(TINY | overrides))).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference(folder: Path, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Reference | None:
    """What `generate` writes greedily; None where two tokens are as good as each other at some place."""
    ids = torch.tensor([prompt])
    result = load(folder).generate(
        ids,
        attention_mask=torch.ones_like(ids),  # the id of padding is a token like others
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(result.logits).topk(2).values
    if (best[:, 0] - best[:, 1]).min() < SMALLEST_MARGIN * best.abs().max():
        return None
    return Reference(prompt, result.sequences[0, len(prompt) :].tolist())


def references(folder: Path, lengths: list[int], new_tokens: int = NEW_TOKENS, seed: int = 0) -> list[Reference]:
    """One for each length, with random prompts of bytes."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Reference] = []
    while len(found) < len(lengths):
        prompt = torch.randint(0, 256, (lengths[len(found)],), generator=generator).tolist()
        one = reference(folder, prompt, new_tokens)
        if one is not None:
            found.append(one)
    return found
