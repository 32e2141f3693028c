"""What vLLM calls in each of its processes, through the entry point group `vllm.general_plugins`."""

MODELS = "tnl.serving.modeling"
ARCHITECTURES = ("TnlForCausalLM", "TnlHybridForCausalLM", "TransnormerForCausalLM")


def register() -> None:
    """Make the models of both formats known to vLLM; calling it again changes nothing."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import tnl.models  # noqa: F401 (registers the configurations with transformers)
    from tnl.serving.configuration import ServingConfig

    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}")
        # vLLM has no public way to say how a model's states are to be paged. Without an entry here it
        # stops at start-up, since no block size is chosen.
        MODELS_CONFIG_MAP[architecture] = ServingConfig
