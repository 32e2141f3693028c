"""TNL on vLLM's engine: token for token what `generate` writes. Tier T0, needs vLLM (`make test-serve`)."""

import gc
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving_models import NEW_TOKENS, Reference, load, reference, references, save_tiny
from tnl.models.tnl.matrix_network import MatrixNetwork
from tnl.serving.folder import CHAT_TEMPLATE, has_chat_template
from tnl.serving.server import share_cores
from tnl.training.tokenizer import train_bpe
from tnss import Structure

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1500)]  # processes start slowly where much else runs

# 64 prompts of 1 to 3,000 tokens; several of one token, and lengths next to those of a chunk and a block.
LENGTHS = [1, 1, 1, 1, 2, 2, 3, 127, 128, 129, 255, 256, 257, 258, 511, 512, 513, 3000, 2999]
LENGTHS += [int(3000 ** (i / 44)) for i in range(45)]
CHUNK = 256
StartEngine = Callable[..., Any]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartEngine]:
    """Starts vLLM in this process; what was started is gone after the test."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    started: list[Any] = []

    def start(folder: Path, states: int = 33, **options: Any) -> Any:
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 8192,
            "max_num_seqs": 32,
            "max_num_batched_tokens": CHUNK,
            "kv_cache_memory_bytes": 64 << 20,
            "num_gpu_blocks_override": states,
            "disable_log_stats": False,
        }
        started.append(LLM(str(folder), **(defaults | options)))
        return started[-1]

    yield start
    if started:
        for each in started:
            each.llm_engine.engine_core.shutdown()
        started.clear()
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Reference]:
    return references(folder, LENGTHS)


def greedy(new_tokens: int = NEW_TOKENS, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **options)


def run(llm: Any, wanted: list[Reference], new_tokens: int = NEW_TOKENS) -> list[Any]:
    """All at once; returns vLLM's results after comparing their tokens."""
    prompts = [{"prompt_token_ids": each.prompt} for each in wanted]
    results = llm.generate(prompts, greedy(new_tokens), use_tqdm=False)
    for each, result in zip(wanted, results, strict=True):
        assert list(result.outputs[0].token_ids) == each.tokens, f"prompt of {len(each.prompt)} tokens"
    return results


def counter(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_all_at_once_and_while_others_decode(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    llm = engine(folder)
    run(llm, expected)  # 64 requests, 32 at a time, in chunks of 256 tokens

    core, results, waiting, aborted = llm.llm_engine, {}, list(range(len(expected))), set()
    steps = 0
    while waiting or core.has_unfinished_requests():
        if waiting and steps % 2 == 0:  # one arrives every other step
            each = waiting.pop(0)
            core.add_request(str(each), {"prompt_token_ids": expected[each].prompt}, greedy())
            if each % 5 == 4:  # a client goes away; its row is taken by one that comes later
                aborted.add(each - 2)
                core.abort_request([str(each - 2)])
        for output in core.step():
            if output.finished:
                results[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
    finished = [each for each in range(len(expected)) if each not in aborted]
    assert len(aborted) == 12
    for each in finished:
        assert results[each] == expected[each].tokens, f"prompt of {len(expected[each].prompt)} tokens"


def test_few_states(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    run(engine(folder, states=4), expected[:24])  # 3 requests have a state at a time, the others wait


def test_preemption(engine: StartEngine, folder: Path) -> None:
    """With prefix caching a request needs more blocks as it grows; where none is left another has to give way."""
    wanted = references(folder, [100, 110, 120, 90, 60, 125], new_tokens=60)
    llm = engine(folder, states=7, enable_prefix_caching=True, block_size=32)
    run(llm, wanted, new_tokens=60)
    assert counter(llm, "vllm:num_preemptions") > 0


def test_prefix_caching(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    llm = engine(folder, states=200, enable_prefix_caching=True)
    run(llm, expected)
    long = [each for each in expected if len(each.prompt) > 300]
    again = run(llm, long)
    assert all(result.num_cached_tokens >= len(each.prompt) - 32 for result, each in zip(again, long, strict=True))
    first, kept = long[0].prompt, again[0].num_cached_tokens  # the conversation goes on from there, in several ways
    others = [one for i in range(8) if (one := reference(folder, [*first[:kept], *range(i, 30)])) is not None]
    assert all(result.num_cached_tokens == kept for result in run(llm, others))


def test_prompts_that_begin_alike(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    """The state at the end of each step of a prompt is kept where that is asked for; the next goes on from the last."""
    llm = engine(folder, states=200, enable_prefix_caching=True, prefix_cache_retention_interval=16)
    common = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [[*common, *range(i, 60)] for i in range(8)]
    wanted = [one for prompt in prompts if (one := reference(folder, prompt)) is not None]
    run(llm, [*expected[:8], wanted[0], *expected[8:12]])  # beside others, so that steps end anywhere
    again = run(llm, wanted[1:])
    assert all(len(common) - CHUNK <= result.num_cached_tokens < len(common) for result in again)


def test_compiled(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    run(engine(folder, enforce_eager=False), expected)


def a_novel(shared_data: Path) -> list[str]:
    with lzma.open(shared_data / "novels" / "test" / "moby-dick.txt.xz", "rt") as file:
        return file.read().splitlines()[:4000]


def finished(text: str) -> str:
    """Without the character that is not yet whole at the end."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_released_format(engine: StartEngine, shared_data: Path, tmp_path: Path) -> None:
    """As it is released: weights, a sentencepiece file, and a tokenizer class of whose code the folder has a name."""
    import sentencepiece

    for name in ("config.json", "model.safetensors"):
        shutil.copy(shared_data / "released-format-checkpoint" / name, tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(a_novel(shared_data)), model_prefix=str(tmp_path / "tokenizer"), vocab_size=512,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "BaiChuanTokenizer", "add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>",
                "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = engine(tmp_path)
    run(llm, references(tmp_path, [1, 1, 2, 30, 300, 700]))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    prompt = pieces.encode("Human:\nCall  me Ishmael \u20ac.\nAssistant:\n")
    answer = talk(llm, CHAT_TEMPLATE.read_text(), [{"role": "user", "content": "Call  me Ishmael \u20ac."}], prompt)
    decode = llm.get_tokenizer().decode
    assert finished(answer.text) == finished(decode(answer.token_ids))
    assert decode(prompt) == pieces.decode(prompt)


def test_chat_template_of_the_model(engine: StartEngine, shared_data: Path, tmp_path: Path) -> None:
    """A byte-pair encoding with tokens for the turns of a conversation, saved with its template."""
    save_tiny(tmp_path, vocab_size=400)
    tokenizer = train_bpe(a_novel(shared_data), 398)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    assert has_chat_template(str(tmp_path))
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ishmael."},
             {"role": "user", "content": "Tell me more,  please."}]  # fmt: skip
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt.count(tokenizer.convert_tokens_to_ids("<|turn|>")) == 4
    answer = talk(engine(tmp_path), None, turns, prompt)
    assert finished(answer.text) == finished(tokenizer.decode(answer.token_ids, skip_special_tokens=True))


def talk(llm: Any, template: str | None, messages: list[dict[str, str]], prompt: list[int]) -> Any:
    """The answer in a conversation, compared with how `generate` continues `prompt`."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    (result,) = llm.chat(messages, parameters, chat_template=template, use_tqdm=False)
    assert result.prompt_token_ids == prompt
    wanted = reference(Path(llm.llm_engine.vllm_config.model_config.model), prompt)
    assert wanted is not None
    assert list(result.outputs[0].token_ids) == wanted.tokens
    return result.outputs[0]


VARIANTS: list[dict[str, Any]] = [
    {"lrpe_layers": "all", "gate": "sigmoid", "norm_type": "rms", "decay_schedule": "paper"},
    {"lrpe_layers": [1], "gate": "low_rank_sigmoid", "norm_type": "layer", "tie_word_embeddings": True},
    {"lrpe_layers": "none", "gate": "none", "hidden_act": "1+elu", "value_act": "silu", "glu_act": "silu",
     "decay_schedule": "none", "scale_embeddings": False, "head_dim": 24, "num_attention_heads": 3},
]  # fmt: skip
SHORT = [1, 1, 3, 40, 300]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: overrides["gate"])
def test_variants(engine: StartEngine, tmp_path: Path, overrides: dict[str, Any]) -> None:
    save_tiny(tmp_path, **overrides)
    run(engine(tmp_path), references(tmp_path, SHORT))


HYBRID: dict[str, Any] = {  # heads as wide as vLLM's softmax attention needs them on a CPU
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 32,
}  # fmt: skip


def test_hybrid(engine: StartEngine, tmp_path: Path) -> None:
    """Softmax attention beside states: keys and values in pages, a state a request, in one pool of blocks."""
    save_tiny(tmp_path, **HYBRID)
    run(engine(tmp_path, states=300), references(tmp_path, [*SHORT, 513, 1500]))


def low_rank(rows: int, columns: int, rank: int) -> dict[str, Any]:
    structure = Structure([rows, columns], [(0, 1, rank)])
    return MatrixNetwork((rows, columns), (rows,), (columns,), ((0,), (1,)), structure, ((0, 0),)).to_dict()


def train_of_matrices(rows: tuple[int, int], columns: tuple[int, int], rank: int) -> dict[str, Any]:
    sizes = [rows[0] * columns[0], rows[1] * columns[1]]
    network = (rows[0] * rows[1], columns[0] * columns[1]), rows, columns, ((0, 2), (1, 3))
    return MatrixNetwork(*network, Structure(sizes, [(0, 1, rank)])).to_dict()


COMPRESSED: dict[str, Any] = {
    "model.embed_tokens": low_rank(320, 64, 40),
    "model.layers.0.attention.qkvu_proj": low_rank(256, 64, 40),
    "model.layers.1.attention.o_proj": train_of_matrices((8, 8), (4, 16), 24),
    "model.layers.1.mlp.gate_proj": train_of_matrices((8, 16), (8, 8), 24),
    "model.layers.2.mlp.down_proj": low_rank(64, 128, 30),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])
def test_compressed(engine: StartEngine, tmp_path: Path, tied: bool) -> None:
    networks = COMPRESSED if tied else COMPRESSED | {"lm_head": low_rank(320, 64, 40)}
    save_tiny(tmp_path, tensor_networks=networks, tie_word_embeddings=tied)
    run(engine(tmp_path), references(tmp_path, SHORT))


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores of two processes, as `tnl serve` shares them out."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", share_cores(2))


@pytest.mark.usefixtures("two_ranks")
def test_tensor_parallel(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    run(engine(folder, tensor_parallel_size=2), expected)


@pytest.mark.usefixtures("two_ranks")
def test_tensor_parallel_of_a_compressed_hybrid(engine: StartEngine, tmp_path: Path) -> None:
    """Weights of the norm, both matrices of the gate and all thetas are cut; compressed matrices are made dense."""
    networks = {name: network for name, network in COMPRESSED.items() if "qkvu" not in name}
    variant = VARIANTS[1] | HYBRID | {"lrpe_layers": "all", "decay_schedule": "paper"}
    save_tiny(tmp_path, **variant, tensor_networks=networks)
    run(engine(tmp_path, states=300, tensor_parallel_size=2), references(tmp_path, SHORT))


@pytest.mark.usefixtures("two_ranks")
def test_pipeline_parallel(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    options = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    run(engine(folder, pipeline_parallel_size=2, **options), expected[:24])


def test_bfloat16_is_as_near_as_torch(engine: StartEngine, folder: Path, expected: list[Reference]) -> None:
    """Of bfloat16, equal tokens cannot be asked: ties are common. Its log-probabilities are compared with float32."""
    from vllm import SamplingParams

    wanted = [each for each in expected if 30 < len(each.prompt) < 400]
    exact, half = load(folder), load(folder).__class__.from_pretrained(folder, dtype=torch.bfloat16).eval()
    llm = engine(folder, dtype="bfloat16")
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    results = llm.generate([{"prompt_token_ids": each.prompt} for each in wanted], parameters, use_tqdm=False)

    def log_probabilities(model: Any, prompt: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

    served_error = torch_error = 0.0
    for each, result in zip(wanted, results, strict=True):
        right = log_probabilities(exact, each.prompt)
        pairs = zip(each.prompt[1:], result.prompt_logprobs[1:], strict=True)
        served = torch.tensor([choices[token].logprob for token, choices in pairs])
        served_error += (served - right).square().sum().item()
        torch_error += (log_probabilities(half, each.prompt) - right).square().sum().item()
    assert 0 < served_error**0.5 <= 2 * torch_error**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size: expected a divisor of the 4 heads, got 3"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: "),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative_config: .* got 'ngram'",
        ),
    ],
    ids=["heads", "stages", "speculation"],
)
def test_what_is_not_served(engine: StartEngine, folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(folder, **options)
