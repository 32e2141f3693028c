"""Compressed matrices of a served model: as they are on one GPU, made dense where tensor parallelism cuts them up."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from tnl.models.tnl.matrix_network import MatrixNetwork, TensorNetworkEmbedding, TensorNetworkLinear


class ServedTensorNetwork(TensorNetworkLinear):
    """A linear layer that is a tensor network, called as vLLM's own linear layers are."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Multiply `[N, in_features]`; returns a pair of which the second is the bias, None."""
        return super().forward(x), None


def stays_compressed(vllm_config: VllmConfig) -> bool:
    """Whether there are matrices that stay tensor networks; none do under tensor parallelism."""
    alone = vllm_config.parallel_config.tensor_parallel_size == 1
    return alone and bool(vllm_config.model_config.hf_config.tensor_networks)


def kept_network(vllm_config: VllmConfig, name: str) -> MatrixNetwork | None:
    """The tensor network that the matrix of this name in the model stays."""
    if not stays_compressed(vllm_config):
        return None
    described = vllm_config.model_config.hf_config.tensor_networks.get(name)
    return None if described is None else MatrixNetwork.from_dict(described)


def linear(kind: type[nn.Module], vllm_config: VllmConfig, prefix: str, *sizes: Any) -> nn.Module:
    """The linear layer `prefix`: of a kind and sizes that vLLM has, without a bias, or its tensor network."""
    network = kept_network(vllm_config, prefix)
    if network is not None:
        return ServedTensorNetwork(network)
    return kind(*sizes, bias=False, quant_config=vllm_config.quant_config, prefix=prefix)


def tied_head(embedding: TensorNetworkEmbedding) -> TensorNetworkLinear:
    """A language-model head on the cores of the embedding."""
    head = TensorNetworkLinear(embedding.network, device="meta")
    for name, core in embedding.named_parameters():
        setattr(head, name, core)
    for name, order in embedding.named_buffers():
        setattr(head, name, order)
    return head


def make_dense(weights: Iterable[tuple[str, Tensor]], networks: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint with each tensor network in place of its cores as one matrix.

    Args:
        weights: Names and tensors.
        networks: For the name of each compressed matrix what `MatrixNetwork.to_dict` gave.
    """
    modules = {
        name: TensorNetworkLinear(MatrixNetwork.from_dict(network), dtype=torch.float32)
        for name, network in networks.items()
    }
    missing = {name: set(module.state_dict()) for name, module in modules.items()}
    for name, tensor in weights:
        owner, _, part = name.rpartition(".")
        if owner not in modules:
            yield name, tensor
            continue
        module = modules[owner]
        with torch.no_grad():
            getattr(module, part).copy_(tensor)
        missing[owner].discard(part)
        if not missing[owner]:
            yield f"{owner}.weight", modules.pop(owner).dense().detach()
