"""Matrices as tensor networks: layout, layers, models with them. Tier T0."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tnl.models import TnlConfig, TnlForCausalLM, TnlModel
from tnl.models.tnl.matrix_network import MatrixNetwork, TensorNetworkEmbedding, TensorNetworkLinear
from tnss import Structure


def make_network(
    shape: tuple[int, int],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    modes: tuple[tuple[int, ...], ...],
    edges: list[tuple[int, int, int]],
    pinned: tuple[tuple[int, int], ...] = (),
) -> MatrixNetwork:
    sizes = [math.prod((rows + columns)[factor] for factor in mode) for mode in modes]
    return MatrixNetwork(shape, rows, columns, modes, Structure(sizes, edges), pinned)


NETWORKS = {
    "two vertices": make_network((12, 10), (12,), (10,), ((0,), (1,)), [(0, 1, 3)]),
    "two vertices, pinned": make_network((12, 10), (12,), (10,), ((0,), (1,)), [(0, 1, 3)], ((0, 0),)),
    "rank 1": make_network((12, 10), (12,), (10,), ((0,), (1,)), []),
    "graph with padding": make_network(
        (11, 9), (3, 4), (2, 5), ((0,), (1,), (2,), (3,)), [(0, 1, 2), (1, 2, 3), (2, 3, 2), (0, 3, 2), (0, 2, 2)],
        ((1, 3),),
    ),
    "pairs": make_network((12, 10), (3, 4), (2, 5), ((0, 2), (1, 3)), [(0, 1, 3)]),
    "internal vertex": make_network((12, 10), (3, 4), (10,), ((0,), (1,), (2,)), [(0, 3, 2), (1, 3, 3), (2, 3, 4)]),
}  # fmt: skip


def set_normal(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)


def dense_by_definition(module: TensorNetworkLinear) -> torch.Tensor:
    """Entry by entry: the sum over bonds of products of entries of the cores."""
    network = module.network
    structure = network.structure
    cores = [core.reshape(shape) for core, shape in zip(module.whole_cores(), structure.core_shapes, strict=True)]
    tensor = torch.zeros(structure.sizes, dtype=torch.float64)
    ranks = [range(rank) for _, _, rank in structure.edges]
    for index in itertools.product(*(range(size) for size in structure.sizes)):
        for bonds in itertools.product(*ranks):
            entry = torch.ones((), dtype=torch.float64)
            for vertex, core in enumerate(cores):
                place = [bonds[edge] for edge in structure.incident[vertex]]
                entry = entry * core[(*place, *index[vertex : vertex + 1])]
            tensor[index] += entry
    return network.unfold(tensor)


@pytest.mark.parametrize("name", NETWORKS)
def test_linear_is_the_product_with_the_dense_matrix(name: str) -> None:
    layer = TensorNetworkLinear(NETWORKS[name], dtype=torch.float64)
    set_normal(layer)
    m, n = layer.network.shape
    x = torch.randn(3, 4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = layer.dense()
    torch.testing.assert_close(dense, dense_by_definition(layer))
    for tokens in (x, x[:1, :1], x.repeat(20, 1, 1)):
        torch.testing.assert_close(layer(tokens), tokens @ dense.T)
    assert layer.dense().shape == (m, n)
    assert sum(parameter.numel() for parameter in layer.parameters()) == layer.network.parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name: str) -> None:
    layer = TensorNetworkLinear(NETWORKS[name], dtype=torch.float64)
    set_normal(layer)
    x = torch.randn(2, layer.in_features, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())

    def call(x: torch.Tensor, *cores: torch.Tensor) -> torch.Tensor:
        names = (name for name, _ in layer.named_parameters())
        return torch.func.functional_call(layer, dict(zip(names, cores, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("name", NETWORKS)
def test_embedding_looks_up_rows_of_the_dense_matrix(name: str) -> None:
    table = TensorNetworkEmbedding(NETWORKS[name], dtype=torch.float64)
    set_normal(table)
    rows = table.num_embeddings
    dense = table.dense()
    for ids in (torch.tensor(rows - 1), torch.tensor([[0, rows - 1], [3, 3]]), torch.arange(rows).repeat(2)):
        torch.testing.assert_close(table(ids), dense[ids])


def test_fold_and_unfold() -> None:
    for network in NETWORKS.values():
        matrix = torch.randn(network.shape)
        folded = network.fold(matrix)
        assert folded.shape == network.structure.sizes
        assert torch.equal(network.unfold(folded), matrix)


def test_description_is_json_and_comes_back() -> None:
    for network in NETWORKS.values():
        assert MatrixNetwork.from_dict(network.to_dict()) == network
    with pytest.raises(ValueError, match="expected what MatrixNetwork"):
        MatrixNetwork.from_dict({"shape": [3, 4]})
    wrong = NETWORKS["two vertices"].to_dict() | {"rows": [5]}
    with pytest.raises(ValueError, match="rows: expected factors with a product of at least 12"):
        MatrixNetwork.from_dict(wrong)
    with pytest.raises(ValueError, match="pinned: expected pairs of a vertex and one of its edges"):
        MatrixNetwork.from_dict(NETWORKS["pairs"].to_dict() | {"pinned": [[0, 1]]})


def test_dtype_and_device_follow_the_module() -> None:
    layer = TensorNetworkLinear(NETWORKS["two vertices, pinned"], dtype=torch.float32).to(torch.bfloat16)
    set_normal(layer)
    x = torch.randn(4, 10, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    with torch.device("meta"):
        assert TensorNetworkLinear(NETWORKS["pairs"])(torch.empty(4, 10)).shape == (4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


def test_compiles_without_a_graph_break() -> None:
    layer = TensorNetworkLinear(NETWORKS["graph with padding"])
    set_normal(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, layer.in_features)
    torch.testing.assert_close(compiled(x), layer(x))


def tiny_config(tied: bool) -> TnlConfig:
    shapes = {"model.layers.0.mlp.gate_proj": (48, 32), "model.embed_tokens": (64, 32)}
    networks = {
        name: make_network((m, n), (m,), (n,), ((0,), (1,)), [(0, 1, 5)], ((0, 0),)) for name, (m, n) in shapes.items()
    }
    networks["model.layers.1.attention.qkvu_proj"] = make_network(
        (128, 32), (4, 32), (32,), ((0,), (1,), (2,)), [(0, 1, 3), (1, 2, 4), (0, 2, 2)]
    )
    return TnlConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        tie_word_embeddings=tied, initializer_range=0.1, pad_token_id=None,
        tensor_networks={name: network.to_dict() for name, network in networks.items()},
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_model_saves_loads_generates_and_trains(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TnlForCausalLM(tiny_config(tied)).eval()
    ids = torch.randint(0, 64, (2, 12))
    logits = model(ids).logits
    assert 0.01 < float(logits.detach().std()) < 10  # new weights are of the usual size
    model.save_pretrained(tmp_path)
    for loader in (TnlForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path).eval()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-4, atol=1e-4)
    if tied:
        assert loaded.lm_head.core_0 is loaded.model.embed_tokens.core_0
    hidden = TnlModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state
    torch.testing.assert_close(loaded.lm_head(hidden), logits, rtol=1e-4, atol=1e-4)
    generated = loaded.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 7)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.gate_proj.core_0.dtype == torch.bfloat16
    loaded.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_network_that_fits_no_matrix_is_refused() -> None:
    network = NETWORKS["two vertices"].to_dict()
    with pytest.raises(ValueError, match=r"expected a network of shape \(48, 32\)"):
        TnlForCausalLM(
            TnlConfig.from_preset(
                "tiny", hidden_size=32, num_attention_heads=2, intermediate_size=48,
                tensor_networks={"model.layers.0.mlp.gate_proj": network},
            )
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected names of matrices of the model"):
        TnlForCausalLM(TnlConfig.from_preset("tiny", tensor_networks={"model.layers.0.mlp": network}))
    with pytest.raises(ValueError, match="tensor_networks must be None or a dict"):
        TnlConfig.from_preset("tiny", tensor_networks={"lm_head": 3})
