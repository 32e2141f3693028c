"""`tnl generate`: continue a text, token by token on standard output."""

import sys
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from tnl.models import TnlForCausalLM
from tnl.models.tnl.decoding_tnl import decode
from tnl.training.config import GenerationSettings
from tnl.training.model import choose_device, load_model
from tnl.training.tokenizer import TextEncoder


def generate(settings: GenerationSettings) -> str:
    """Print what the model writes after the prompt, as it is written; returns it as well.

    Raises:
        ValueError: The model has no tokenizer.
        OSError: The model cannot be read.
    """
    prompt = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    model, tokenizer = load_model(settings.model, choose_device(settings.device), settings.dtype)
    encoder = TextEncoder(tokenizer)
    tokens = torch.from_numpy(encoder.encode([prompt])[0][:-1].astype("int64"))[None].to(model.device)

    torch.manual_seed(settings.seed)
    sampling = {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p or None,
    }
    configuration = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        repetition_penalty=settings.repetition_penalty,
        do_sample=settings.temperature > 0,
        bos_token_id=encoder.begin,
        eos_token_id=encoder.end,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else encoder.end,
        **(sampling if settings.temperature > 0 else {}),
    )
    streamer = None
    if settings.num_beams == 1:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"streamer": streamer}
    if isinstance(model, TnlForCausalLM) and model.config.layer_types is None and settings.num_beams == 1:
        options = {"token_streamer": streamer, "custom_generate": decode}
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=configuration, **options)
    text = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    if streamer is None:
        print(text)
    return text
