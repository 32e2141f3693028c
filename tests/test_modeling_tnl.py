"""The model: its cache, generation, packing, padding, loss, saving, and the libraries it meets.

Tier T0, and T3 at the end.
"""

import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

import tnl.models.tnl.modeling_tnl as modeling
from tests.small_models import HYBRID, STACKS, VOCABULARY, logits_of, random_tokens, small_config, small_model
from tnl.models import TnlCache, TnlConfig, TnlForCausalLM, TnlModel


def test_inputs_embeds_are_not_scaled() -> None:
    model = small_model()
    input_ids = random_tokens(2, 9)
    embeds = model.model.embed_tokens(input_ids).detach()
    expected = logits_of(model, input_ids)
    assert torch.equal(logits_of(model, inputs_embeds=embeds * 24**0.5), expected)
    assert not torch.allclose(logits_of(model, inputs_embeds=embeds), expected)
    assert torch.equal(
        logits_of(small_model(scale_embeddings=False), input_ids), logits_of(model, inputs_embeds=embeds)
    )


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = TnlForCausalLM(TnlConfig.from_preset("tiny", pad_token_id=3, initializer_range=0.02, num_attention_heads=2))
    for name, parameter in model.named_parameters():
        if name.endswith("theta"):
            expected = 10000 ** (-2 / 64 * torch.arange(64.0))
            torch.testing.assert_close(parameter, expected.expand(2, 1, 64))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 1e-3, name
    assert (model.get_input_embeddings().weight[3] == 0).all()


def test_weights_that_begin_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = TnlForCausalLM(small_config(norm_type="layer"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.apply(model._init_weights)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert logits_of(model, random_tokens(1, 5)).isfinite().all()


def test_sixteen_bit_model_decays_and_remembers_in_float32() -> None:
    model = small_model(initializer_range=0.05).to(torch.bfloat16)
    input_ids = random_tokens(2, 50)
    outputs = model(input_ids)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.past_key_values.layers[0].state.dtype == torch.float32
    assert all(decay.dtype == torch.float32 for decay in model.model.log_decay(torch.device("cpu")))
    expected = logits_of(small_model(initializer_range=0.05), input_ids)
    assert (outputs.logits - expected).norm() < 0.02 * expected.norm()


def test_dropout_in_training_only() -> None:
    model = small_model(dropout=0.5)
    input_ids = random_tokens(1, 12)
    assert torch.equal(logits_of(model, input_ids), logits_of(small_model(), input_ids))
    model.train()
    assert not torch.equal(logits_of(model, input_ids), logits_of(model, input_ids))


# Cache and generation


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [2, 3, 1, 1, 13], [19, 1]])
@STACKS
def test_pieces_equal_the_whole(pieces: list[int], layer_types: list[str] | None) -> None:
    model = small_model(lrpe_layers=[0, 2], layer_types=layer_types)
    input_ids = random_tokens(2, 20)
    cache = TnlCache(model.config)
    logits = [logits_of(model, piece, past_key_values=cache) for piece in input_ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), logits_of(model, input_ids), rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20


def test_state_of_a_float64_model() -> None:
    outputs = small_model().double()(random_tokens(1, 4), use_cache=True)
    assert outputs.past_key_values.layers[0].state.dtype == torch.float64


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "left-padded"])
@STACKS
def test_generation_equals_the_run_without_a_cache(mode: str, padded: bool, layer_types: list[str] | None) -> None:
    model = small_model(layer_types=layer_types)
    prompt = random_tokens(3, 9)
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :4] = mask[2, :8] = 0
        prompt = prompt * mask
    tokens = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        tokens.append(
            model.generate(prompt, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **GENERATION[mode])
        )
    assert torch.equal(*tokens)
    if padded:  # and each row is what it is alone
        alone = model.generate(prompt[1:2, 4:], max_new_tokens=12, do_sample=False)
        if mode == "greedy":
            assert torch.equal(tokens[0][1:2, 4:], alone)


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@STACKS
def test_prompt_in_pieces(chunk: int, layer_types: list[str] | None) -> None:
    model = small_model(layer_types=layer_types)
    prompt = random_tokens(2, 11)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # with pieces of one token, one of them is padding alone
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **arguments)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=chunk, **arguments), expected)


def test_generation_goes_on_from_a_cache() -> None:
    model = small_model()
    prompt = random_tokens(1, 8)
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False)
    cache = TnlCache(model.config)
    first = model.generate(prompt, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(model.generate(first, max_new_tokens=6, do_sample=False, past_key_values=cache), expected)


def test_memory_of_generation_does_not_grow() -> None:
    model = small_model()
    prompt = random_tokens(2, 5)
    measured: dict[int, int] = {}
    gc.collect()
    # held, so that none of them goes away and leaves its address to another
    before = {id(x): x for x in gc.get_objects() if issubclass(type(x), Tensor)}

    def measure(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] in (15, 65):
            gc.collect()
            new = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and id(x) not in before]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in new}
            measured[input_ids.shape[1]] = sum(storages.values())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    model.generate(prompt, max_new_tokens=60, do_sample=False, stopping_criteria=[measure])
    # Beside the state there are token ids, masks and positions, a few integers a token; keys and values
    # would be 2 rows * 3 layers * 2 * 24 floats = 1152 bytes.
    bytes_a_token = (measured[65] - measured[15]) / 50
    assert 0 < bytes_a_token <= 128


def test_generation_refuses_other_caches() -> None:
    model, prompt = small_model(), random_tokens(1, 4)
    with pytest.raises(ValueError, match="past_key_values must be a TnlCache, got DynamicCache"):
        model.generate(prompt, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"cache_implementation must be None, .* got 'static'"):
        model.generate(prompt, cache_implementation="static", max_new_tokens=2)


# Padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
@STACKS
def test_padding(side: str, layer_types: list[str] | None) -> None:
    model = small_model(layer_types=layer_types)
    documents = [random_tokens(1, n) for n in (12, 5, 1)]
    left = side == "left"
    padding = [((12 - d.shape[1]) if left else 0, 0 if left else 12 - d.shape[1]) for d in documents]
    batch = torch.cat([F.pad(d, pad, value=0) for d, pad in zip(documents, padding, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(d), pad) for d, pad in zip(documents, padding, strict=True)])
    logits = logits_of(model, batch, attention_mask=mask)
    assert logits.isfinite().all()
    for row, document in enumerate(documents):
        torch.testing.assert_close(logits[row, mask[row].bool()], logits_of(model, document)[0], rtol=1e-4, atol=1e-4)


def test_padding_does_not_depend_on_what_is_padded_with() -> None:
    model = small_model()
    batch = random_tokens(1, 10)
    mask = torch.ones_like(batch)
    mask[:, :3] = 0
    other = batch.clone()
    other[:, :3] = 7
    assert not torch.equal(batch, other)
    both = [logits_of(model, x, attention_mask=mask)[:, 3:] for x in (batch, other)]
    assert torch.equal(*both)


LENGTHS = [1, 7, 2, 10]


@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens_q"])
@STACKS
def test_packed_equals_alone(boundaries: str, layer_types: list[str] | None) -> None:
    """Logits and gradients, on what the collator of transformers makes."""
    documents = [random_tokens(1, n) for n in LENGTHS]
    collate = DataCollatorWithFlattening(
        return_position_ids=boundaries == "position_ids", return_flash_attn_kwargs=boundaries == "cu_seq_lens_q"
    )
    batch = collate([{"input_ids": d[0].tolist()} for d in documents])
    assert boundaries in batch
    packed, alone = small_model(layer_types=layer_types), small_model(layer_types=layer_types)
    outputs = packed(**batch)
    expected = torch.cat([logits_of(alone, d) for d in documents], dim=1)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-4)
    outputs.loss.backward()
    count = sum(n - 1 for n in LENGTHS)
    for d in documents:
        alone(d, labels=d, num_items_in_batch=count).loss.backward()
    for ours, wanted in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-3, atol=1e-5)


@STACKS
def test_packed_rows(layer_types: list[str] | None) -> None:
    """Two rows of one batch, with other boundaries in each."""
    model = small_model(layer_types=layer_types)
    input_ids = random_tokens(2, 10)
    position_ids = torch.stack([torch.arange(10), torch.cat([torch.arange(4), torch.arange(6)])])
    logits = logits_of(model, input_ids, position_ids=position_ids)
    parts = [logits_of(model, x) for x in (input_ids[:1], input_ids[1:, :4], input_ids[1:, 4:])]
    expected = torch.cat([parts[0], torch.cat(parts[1:], dim=1)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_packed_documents_have_no_cache() -> None:
    model, input_ids = small_model(), random_tokens(1, 6)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert model(input_ids, cu_seq_lens_q=boundaries).past_key_values is None
    with pytest.raises(ValueError, match="packed documents cannot be combined with use_cache"):
        model(input_ids, cu_seq_lens_q=boundaries, use_cache=True)


def test_packed_documents_of_a_hybrid_stack_have_no_mask() -> None:
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot be combined with attention_mask in a hybrid stack"):
        small_model(layer_types=HYBRID)(random_tokens(1, 6), cu_seq_lens_q=boundaries, attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize("mask", [torch.ones(1, 5), torch.ones(1, 1, 6, 6)])
def test_mask_of_the_wrong_shape(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask must be"):
        small_model()(random_tokens(1, 6), attention_mask=mask)


def test_one_kind_of_input() -> None:
    input_ids = random_tokens(1, 6)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        small_model()()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        small_model()(input_ids, inputs_embeds=torch.zeros(1, 6, 24))


# Loss and memory in training


def test_loss_in_chunks_of_a_wrapped_head_equals_the_loss_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "LOGITS_PER_CHUNK", 5 * VOCABULARY)
    input_ids = random_tokens(2, 13)
    labels = input_ids.clone()
    labels[0, :6] = -100
    lean, plain = small_model().train(), small_model().train()
    lengths: list[int] = []
    lean.lm_head.register_forward_hook(lambda module, args, output: lengths.append(len(output)))
    outputs = lean(input_ids, labels=labels)
    assert outputs.logits is None
    wanted = plain(input_ids, labels=labels, return_logits=True)
    assert wanted.logits.shape == (2, 13, VOCABULARY)
    by_hand = F.cross_entropy(wanted.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(wanted.loss, by_hand)
    torch.testing.assert_close(outputs.loss, by_hand)
    outputs.loss.backward()
    wanted.loss.backward()
    assert max(lengths) == 5
    assert sum(lengths) == 2 * 26  # each token once forward and once more for the backward pass
    for ours, theirs in zip(lean.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_lean_loss_has_the_gradients_of_the_loss_of_logits() -> None:
    input_ids = random_tokens(2, 13)
    lean, plain = small_model().train(), small_model().train()
    outputs, wanted = lean(input_ids, labels=input_ids), plain(input_ids, labels=input_ids, return_logits=True)
    assert outputs.logits is None
    outputs.loss.backward()
    wanted.loss.backward()
    torch.testing.assert_close(outputs.loss, wanted.loss)
    for ours, theirs in zip(lean.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_loss_over_the_tokens_of_the_whole_batch(training: bool, as_tensor: bool) -> None:
    model = small_model().train(training)
    input_ids = random_tokens(1, 9)
    mean = model(input_ids, labels=input_ids).loss
    count = torch.tensor(32) if as_tensor else 32
    torch.testing.assert_close(model(input_ids, labels=input_ids, num_items_in_batch=count).loss, mean * 8 / 32)
    shifted = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(input_ids, shift_labels=shifted).loss, mean)


def test_logits_to_keep() -> None:
    model = small_model()
    input_ids = random_tokens(2, 9)
    logits = logits_of(model, input_ids)
    torch.testing.assert_close(logits_of(model, input_ids, logits_to_keep=2), logits[:, -2:])
    kept = torch.tensor([0, 5])
    torch.testing.assert_close(logits_of(model, input_ids, logits_to_keep=kept), logits[:, kept])
    outputs = model(input_ids, labels=input_ids, logits_to_keep=1)
    assert outputs.logits.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(outputs.loss, model(input_ids, labels=input_ids).loss)


@STACKS
def test_gradient_checkpointing(layer_types: list[str] | None) -> None:
    plain, checkpointed = (small_model(layer_types=layer_types).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    input_ids = random_tokens(2, 9)
    calls: list[int] = []
    checkpointed.model.layers[1].attention.register_forward_hook(lambda *_: calls.append(1))
    losses = [model(input_ids, labels=input_ids).loss for model in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert len(calls) == 2
    for ours, wanted in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, wanted.grad)


def test_hidden_states() -> None:
    model = small_model()
    input_ids = random_tokens(1, 5)
    outputs = model.model(input_ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)


def test_training_keeps_no_cache() -> None:
    model = small_model().train()
    assert model(random_tokens(1, 5)).past_key_values is None
    assert model.eval()(random_tokens(1, 5)).past_key_values is not None
    assert model(random_tokens(1, 5), use_cache=False).past_key_values is None


# torch.compile


@pytest.mark.parametrize("layer_types", [None, HYBRID[:2]], ids=["linear", "hybrid"])
def test_causal_model_compiles_without_a_graph_break(layer_types: list[str] | None) -> None:
    model = small_model(num_hidden_layers=2, layer_types=layer_types).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    input_ids = random_tokens(2, 8)
    loss = compiled(input_ids, labels=input_ids).loss
    torch.testing.assert_close(loss, model(input_ids, labels=input_ids).loss)
    loss.backward()


# Saving and other libraries


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tied: bool, tmp_path: Path) -> None:
    model = small_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert len(pickle.dumps(model)) > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = random_tokens(2, 9)
    assert type(loaded) is TnlForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    torch.testing.assert_close(logits_of(loaded, input_ids), logits_of(model, input_ids))
    in_16_bits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits_of(in_16_bits, input_ids).dtype == torch.bfloat16
    theta = "model.layers.0.attention.lrpe.theta"
    assert torch.equal(in_16_bits.get_parameter(theta), model.get_parameter(theta))
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is TnlModel
    with torch.no_grad():
        hidden_states = backbone(input_ids).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden_states), logits_of(model, input_ids))


def repeating_rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": [3 + (i + j) % 5 for j in range(16)]} for i in range(16)]


def training_arguments(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **overrides,
    }


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_hugging_face_trainer(tmp_path: Path) -> None:
    trainer = Trainer(
        small_model(initializer_range=0.02),
        TrainingArguments(**training_arguments(tmp_path, gradient_checkpointing=True)),
        train_dataset=repeating_rows(),
        eval_dataset=repeating_rows(),
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=0.5)
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.evaluate()["eval_loss"] < 0.5 * losses[0]


def test_low_rank_adapters(tmp_path: Path) -> None:
    """peft adapts every projection; what is saved goes back onto the base model."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(small_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, p in model.named_parameters() if "lora_A" in name}
    assert adapted == {"qkvu_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    input_ids = random_tokens(4, 12)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(small_model(), tmp_path)
    torch.testing.assert_close(logits_of(again, input_ids=input_ids), logits_of(model, input_ids=input_ids))
    merged = model.merge_and_unload()
    torch.testing.assert_close(
        logits_of(merged, input_ids), logits_of(again, input_ids=input_ids), rtol=1e-3, atol=1e-4
    )


def test_supervised_fine_tuning_with_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = ["<pad>", "<eos>", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = SFTTrainer(
        small_model(initializer_range=0.02),
        SFTConfig(**training_arguments(tmp_path, max_length=32, packing=True, bf16=False)),
        train_dataset=Dataset.from_dict({"text": ["a b c d e f g h"] * 4 + ["h g f e d c b a"] * 12}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
    )
    trainer.train()
    assert losses_of(trainer)[-1] < 0.5 * losses_of(trainer)[0]


# On a GPU


def gpu_model(**overrides: Any) -> TnlForCausalLM:
    torch.manual_seed(1)
    fields = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.05}
    return TnlForCausalLM(TnlConfig.from_preset("tiny", **{**fields, **overrides}))


@pytest.mark.gpu
@STACKS
def test_logits_and_generation_on_a_gpu(layer_types: list[str] | None) -> None:
    model = gpu_model(layer_types=layer_types[:2] if layer_types else None).eval()
    input_ids = random_tokens(3, 97)
    mask = torch.ones_like(input_ids)
    mask[1, :33] = 0
    expected = logits_of(model, input_ids, attention_mask=mask)
    model, input_ids, mask = model.cuda(), input_ids.cuda(), mask.cuda()
    logits = logits_of(model, input_ids, attention_mask=mask).cpu()
    real = mask.bool().cpu()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-3, atol=1e-3)
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    tokens = [model.generate(input_ids, use_cache=use_cache, **arguments) for use_cache in (True, False)]
    assert torch.equal(*tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens_q"])
def test_compiled_layers_train_in_16_bits_on_a_gpu(boundaries: str) -> None:
    documents = [random_tokens(n).tolist() for n in (1, 300, 77, 646)]
    collate = DataCollatorWithFlattening(
        return_position_ids=boundaries == "position_ids", return_flash_attn_kwargs=boundaries == "cu_seq_lens_q"
    )
    batch = collate([{"input_ids": document} for document in documents])
    batch = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in batch.items()}
    exact, eager, compiled = (gpu_model().cuda().train() for _ in range(3))
    for layer in compiled.model.layers:
        layer.compile(fullgraph=True)
    losses = []
    for model in (exact, eager, compiled):
        with torch.autocast("cuda", torch.bfloat16, enabled=model is not exact):
            losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-3, atol=0)
    for name, wanted in exact.named_parameters():
        errors = [(model.get_parameter(name).grad - wanted.grad).norm() for model in (eager, compiled)]
        assert errors[1] <= 3 * errors[0], name


@pytest.mark.gpu
def test_loss_in_training_never_holds_all_logits() -> None:
    model = gpu_model(vocab_size=64000, num_hidden_layers=1).cuda().train()
    input_ids = random_tokens(1, 16384).cuda()
    torch.cuda.reset_peak_memory_stats()
    model(input_ids, labels=input_ids).loss.backward()
    assert torch.cuda.max_memory_allocated() < 16384 * 64000 * 4 / 2
