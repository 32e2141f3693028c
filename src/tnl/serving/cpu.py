"""What vLLM 0.32 needs on a CPU so that a request with a seed does not end the engine."""

import functools
from typing import Any


def keep_seeds_of_unfinished_prompts() -> None:
    """Hide the generators of requests whose prompt is not read to its end while vLLM samples.

    After a chunk of a prompt vLLM samples a token, drops it, and winds the request's generator back by an offset. The
    generators of a CPU have none: the call raises and the engine ends. Hidden ones are neither used nor wound back.
    Calling this again changes nothing.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sample_tokens
    if hasattr(original, "__wrapped__") and original.__module__ == __name__:
        return

    @functools.wraps(original, assigned=())
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        dropped = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        hidden = {int(i): batch.generators.pop(int(i)) for i in dropped if int(i) in batch.generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            batch.generators.update(hidden)

    CPUModelRunner.sample_tokens = sample_tokens
