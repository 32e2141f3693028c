"""How vLLM's configuration is completed and checked for a TNL, before any of its processes starts."""

from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata
from vllm.model_executor.models.config import MambaModelConfig
from vllm.platforms import current_platform

from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.models.tnl.released import Shape, TransnormerConfig, find_weight_files, plan_conversion, read_shapes

DEFAULT_MAX_MODEL_LEN = 131_072  # tokens; a TNL has no limit of its own, and a longer request costs no more memory
HYBRID = "TnlHybridForCausalLM"  # of tnl.serving.modeling


def is_hybrid(config: TnlConfig) -> bool:
    """Whether some layers are softmax attention."""
    return not all(config.is_linear(layer) for layer in range(config.num_hidden_layers))


class ServingConfig(MambaModelConfig):
    """What vLLM asks before it starts: for the model's configuration alone, then for all of its own."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Read the dims of a released folder from its tensors; choose a longest request where none is given.

        A hybrid stack gets a class of its own: what vLLM does with keys and values it decides by the class.
        """
        config = model_config.hf_config
        if isinstance(config, TransnormerConfig):
            own, _ = plan_conversion(_shapes(model_config.model, model_config.revision), config, model_config.model)
            own.architectures = config.architectures
            model_config.hf_config = model_config.hf_text_config = own
            model_config.model_arch_config = model_config.get_model_arch_config()
        elif is_hybrid(config):
            config.architectures = [HYBRID]
            model_config.model_arch_config = model_config.get_model_arch_config()
            model_config._model_info, model_config._architecture = model_config.registry.inspect_model_cls(
                config.architectures, model_config
            )
        if model_config.original_max_model_len is None:
            model_config.max_model_len = DEFAULT_MAX_MODEL_LEN

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what a TNL cannot be served with, and choose how states are paged.

        Raises:
            ValueError: Heads or layers cannot be shared out, or speculative decoding is asked for.
        """
        config: TnlConfig = vllm_config.model_config.hf_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if config.num_attention_heads % ranks:
            raise ValueError(
                f"tensor_parallel_size: expected a divisor of the {config.num_attention_heads} heads, got {ranks}"
            )
        if vllm_config.speculative_config is not None:
            method = vllm_config.speculative_config.method
            raise ValueError(f"speculative_config: a TNL is served without it; expected None, got {method!r}")
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1 and vllm_config.model_config.enforce_eager and current_platform.is_cpu():
            # Stages after the first get what they receive into in a run that vLLM 0.32 leaves out then.
            raise ValueError(
                f"pipeline_parallel_size: expected 1 with enforce_eager on a CPU, where vLLM needs compiled models for "
                f"more; got {stages}"
            )
        super().verify_and_update_config(vllm_config)


def _shapes(model: str, revision: str | None) -> dict[str, Shape]:
    """Shapes of the tensors of a folder, or of a repository of the Hugging Face Hub, from their headers."""
    if Path(model).is_dir():
        return read_shapes(find_weight_files(Path(model)))
    files = get_safetensors_metadata(model, revision=revision).files_metadata.values()
    return {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}
