"""Model classes; importing this package registers them with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tnl.models.tnl.cache_tnl import TnlCache
from tnl.models.tnl.configuration_tnl import PRESETS, TnlConfig
from tnl.models.tnl.modeling_tnl import TnlForCausalLM, TnlModel
from tnl.models.tnl.released import TransnormerConfig, TransnormerForCausalLM

AutoConfig.register(TnlConfig.model_type, TnlConfig, exist_ok=True)
AutoModel.register(TnlConfig, TnlModel, exist_ok=True)
AutoModelForCausalLM.register(TnlConfig, TnlForCausalLM, exist_ok=True)
AutoConfig.register(TransnormerConfig.model_type, TransnormerConfig, exist_ok=True)
AutoModelForCausalLM.register(TransnormerConfig, TransnormerForCausalLM, exist_ok=True)
# A released folder has a sentencepiece file, and a tokenizer class of its own, whose code is not run.
AutoTokenizer.register(TransnormerConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)

__all__ = [
    "PRESETS",
    "TnlCache",
    "TnlConfig",
    "TnlForCausalLM",
    "TnlModel",
    "TransnormerConfig",
    "TransnormerForCausalLM",
]
