"""The language modelling benchmark: its scores, texts, sizes and tables, and one run of each kind. Tier T0."""

import argparse
import importlib.util
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.language_modelling import (
    ablations,
    corpus,
    evaluation,
    everything,
    instructions,
    length,
    plots,
    quality,
    recall,
    runs,
    worker,
)
from benchmarks.language_modelling.models import SIZES, configuration, count_parameters, overrides_of
from tnl.training.model import save_model
from tnl.training.tokenizer import byte_tokenizer, train_bpe

HAS_FLA = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("fla.models") is not None
EXPERIMENTS = {"quality": quality.RUNS, "ablations": ablations.RUNS, "length": length.RUNS}


def small_model(model: str) -> PreTrainedModel:
    torch.manual_seed(0)
    name, overrides = overrides_of(model, "tiny", {"initializer_range": 0.2})
    return AutoModelForCausalLM.from_config(configuration(name, overrides), dtype=torch.float32).eval()


def nats_of(model: PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy()


@pytest.mark.parametrize("name", ["tnl", "llama"])
def test_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 24)  # several batches of windows, the last one not full
    model, tokens = small_model(name), torch.randint(256, (60,))
    found = evaluation.nats_in_windows(model, tokens, 8)
    expected = np.concatenate([nats_of(model, tokens[i : i + 9]) for i in range(0, 59, 8)])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    overlapping = evaluation.nats_in_windows(model, tokens, 8, 4)
    pieces = [nats_of(model, tokens[:9])] + [nats_of(model, tokens[i : i + 9])[4:] for i in range(4, 55, 4)]
    np.testing.assert_allclose(overlapping, np.concatenate(pieces), rtol=1e-4)


@pytest.mark.parametrize("window", [7, 100])
def test_stream_has_the_whole_document_before_it(window: int) -> None:
    model, tokens = small_model("tnl"), torch.randint(256, (40,))
    np.testing.assert_allclose(evaluation.nats_streamed(model, tokens, window), nats_of(model, tokens), rtol=1e-4)


def test_bits_by_position_add_up() -> None:
    nats: list[evaluation.Nats] = [np.arange(10, dtype=np.float64), np.ones(5)]
    lengths = [np.ones(10, dtype=np.int64), np.full(5, 2)]
    bins = list(evaluation.by_position(nats, lengths))
    assert [(start, stop) for start, stop, _ in bins] == [(0, 2), (2, 4), (4, 8), (8, 10)]
    assert bins[0][2] == pytest.approx((0 + 1 + 1 + 1) / (2 + 4) / math.log(2))
    assert bins[3][2] == pytest.approx((8 + 9) / 2 / math.log(2))
    assert evaluation.bits_per_byte(nats, 20) == pytest.approx(50 / 20 / math.log(2))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bytes_of_tokens(tokenizer: str) -> None:
    text = "Call me Ishmael. Zwölf Bücher, naïve — “quoted”.\n" * 3
    chosen = byte_tokenizer() if tokenizer == "bytes" else train_bpe([text], 280)
    ids, lengths = worker.encode(chosen, text.encode())
    assert len(lengths) == len(ids) - 1
    assert lengths.sum() == len(text.encode())
    assert (len(lengths) < len(text.encode())) == (tokenizer == "bpe")


def test_books_are_held_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = {"train": ["first book", "second book"], "validation": ["third book"], "test": ["fourth", "fifth"]}
    for split, texts in books.items():
        (tmp_path / "data" / "novels" / split).mkdir(parents=True)
        for i, text in enumerate(texts):
            (tmp_path / "data" / "novels" / split / f"{i}.txt.xz").write_bytes(lzma.compress(text.encode()))
    monkeypatch.setattr(corpus, "SHARED_DATA", tmp_path / "data")
    written = corpus.write_corpus("novels", tmp_path / "work")
    assert written.train.read_text() == "first book\n\n\nsecond book"
    assert written.validation.read_text() == "third book"
    assert [path.read_text() for path in written.documents("test")] == ["fourth", "fifth"]
    monkeypatch.setattr(corpus, "SHARED_DATA", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="expected the novels in"):
        corpus.write_corpus("novels", tmp_path / "other")


@pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
def test_opponents_are_of_the_same_size(size: str) -> None:
    models = ("tnl", "llama", "gla") if HAS_FLA else ("tnl", "llama")
    sizes = {model: count_parameters(*overrides_of(model, size, {})) for model in models}
    assert all(abs(count / sizes["tnl"] - 1) < 0.01 for count in sizes.values()), sizes


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_runs_are_named_once_and_of_their_size(experiment: str) -> None:
    found = EXPERIMENTS[experiment]
    assert len({run.name for run in found}) == len(found)
    for run in found:
        assert run.step_tokens % run.context == 0
        if run.model == "gla" and not HAS_FLA:
            continue
        name, overrides = overrides_of(run.model, run.size, run.changes)
        base = count_parameters(*overrides_of("tnl", run.size, {}))
        assert abs(count_parameters(name, overrides) / base - 1) < 0.01, run.name


def test_runs_of_all_experiments_share_the_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str]] = []

    class Process:
        returncode = 1

        def poll(self) -> int:
            return self.returncode

    def start(command: list[str], env: dict[str, str], **_: object) -> Process:
        started.append((Path(command[-1]).name, env["CUDA_VISIBLE_DEVICES"]))
        return Process()

    monkeypatch.setattr(runs.subprocess, "Popen", start)
    monkeypatch.setattr(runs, "write_corpus", lambda *_: None)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.0)
    parser = argparse.ArgumentParser()
    everything.add_arguments(parser)
    names = ["quality/tnl", "length/tnl-512", "quality/llama", "ablations/norm-rms", "quality/tnl-python"]
    folders = ["--output", str(tmp_path / "o"), "--work", str(tmp_path / "w")]
    options = parser.parse_args([*names, "--gpus", "3,5", "--slots", "4", "--seconds", "1000", *folders])
    everything.run(options)
    # A large run takes two of four slots of its GPU, and another large one does not fit beside a small one.
    assert started == [
        ("tnl", "3"), ("tnl-512", "3"), ("norm-rms", "3"), ("llama", "5"), ("tnl-python", "5"),
    ]  # fmt: skip
    request = runs.read_json(tmp_path / "w" / "quality" / "tnl" / "run.json")
    assert request["side_by_side"] == 3
    with pytest.raises(SystemExit):
        everything.run(parser.parse_args(["tnl", *folders]))


def test_queries_of_recall() -> None:
    inputs, places, values = recall.make_batch(5, 64, 8, torch.Generator().manual_seed(0))
    assert inputs.shape == (5, 64)
    for row, where, wanted in zip(inputs, places, values, strict=True):
        pairs = dict(zip(row[0:16:2].tolist(), row[1:16:2].tolist(), strict=True))
        assert len(pairs) == 8
        assert len(set(where.tolist())) == 8
        assert where.min() >= 16
        assert [pairs[key] for key in row[where].tolist()] == wanted.tolist()


def test_recall_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VOCABULARY": 16, "BATCH_TOKENS": 256, "TEST_ROWS": 64}.items():
        monkeypatch.setattr(recall, name, value)
    for name in ("TRAINING", "TESTS"):
        monkeypatch.setattr(recall, name, ((8, 2),))
    (untrained,) = recall.learn(recall.Trial("llama", 64, 3e-3, steps=1))
    (trained,) = recall.learn(recall.Trial("llama", 64, 3e-3, steps=150))
    assert untrained["accuracy"] < 0.3 < 0.4 < trained["accuracy"]


def test_passages_to_tune_on_and_to_test_with_are_apart() -> None:
    books = {title: b" ".join(b"%s%05d" % (title.encode(), i) for i in range(4000)) for title in ("a", "b")}
    tune, test = instructions.make_examples(books, passages=20, tests=5)
    assert len(tune) == 40
    assert len(test) == 10
    for examples, begin, end in ((tune, 0, 3601), (test, 3599, 4000)):
        for each in examples:
            assert len(each["input"]) == instructions.PASSAGE
            words = each["input"].split()[1:-1]
            assert {word[0] for word in words} == {each["output"]}
            assert all(begin <= int(word[1:]) < end for word in words)


def test_titles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [{"instruction": "?", "input": "ab", "output": title} for title in ("one", "two", "one")]
    model, tokenizer = small_model("tnl"), byte_tokenizer()

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[*b" one", 256]] * len(input_ids))], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert instructions.named(model, tokenizer, examples) == pytest.approx(2 / 3)


def test_bits_of_a_title_are_those_of_its_tokens() -> None:
    examples = [{"instruction": "?", "input": text, "output": title} for text, title in (("ab", "one"), ("cd", "fo"))]
    model, tokenizer = small_model("tnl"), byte_tokenizer()
    nats = 0.0
    for each in examples:
        row = [256, *f"?\nHuman:\n{each['input']}\nAssistant:\n{each['output']}".encode(), 256]
        nats += nats_of(model, torch.tensor(row))[-len(each["output"]) - 1 :].sum()
    found = instructions.title_bits(model, tokenizer, examples)
    assert found == pytest.approx(nats / math.log(2) / 2, rel=1e-4)


@pytest.mark.slow
def test_tuning_from_books_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = [("train", f"book-{i}.txt", b"%d " % i * 2000) for i in range(3)]
    monkeypatch.setattr(instructions, "novels", lambda _: iter(books))
    save_model(small_model("tnl"), byte_tokenizer(), tmp_path / "model")
    parser = argparse.ArgumentParser()
    instructions.add_arguments(parser)
    folders = ["--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")]
    sizes = ["--books", "2", "--passages", "4", "--tests", "2", "--epochs", "1"]
    options = parser.parse_args([str(tmp_path / "model"), *sizes, *folders])
    instructions.run(options)
    rows = runs.read_rows(tmp_path / "o" / "instructions.csv")
    assert [row["way"] for row in rows] == list(instructions.WAYS)
    for row in rows:
        assert (row["books"], row["examples"], row["tests"]) == ("2", "8", "4")
        assert float(row["title_bits"]) < float(row["title_bits_before"])
    instructions.run(options)  # nothing is left to do
    assert runs.read_rows(tmp_path / "o" / "instructions.csv") == rows


def test_tables_keep_runs_made_elsewhere(tmp_path: Path) -> None:
    tables = runs.Tables("quality", tmp_path, tmp_path / "work")
    runs.write_rows(tables.paths["runs"], [{"run": "elsewhere", "device": "H100"}, {"run": "here", "device": "old"}])
    folder = tmp_path / "work" / "quality" / "here"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "result.json").write_text('{"row": {"run": "here", "device": "new"}, "positions": []}')
    tables.collect()
    assert {row["run"]: row["device"] for row in runs.read_rows(tables.paths["runs"])} == {
        "elsewhere": "H100",
        "here": "new",
    }
    assert tables.finished() == {"elsewhere", "here"}


@pytest.mark.slow
def test_a_run_from_text_to_table(tmp_path: Path, shared_data: Path) -> None:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    options = parser.parse_args(["tnl", "--tiny", "--work", str(tmp_path / "w"), "--output", str(tmp_path / "o")])
    quality.run(options)
    (row,) = runs.read_rows(tmp_path / "o" / "quality.csv")
    assert 4 < float(row["validation_stream"]) < 9
    assert row["tokens_per_byte"] == "1.0"
    curve = runs.read_rows(tmp_path / "o" / "quality-curves.csv")
    assert {point["run"] for point in curve} == {"tnl"}
    assert sum(bool(point["held_out_loss"]) for point in curve) == 2
    assert len(runs.read_rows(tmp_path / "o" / "quality-positions.csv")) > 10
    before = (tmp_path / "o" / "quality.csv").stat().st_mtime_ns
    quality.run(options)  # nothing is left to do
    assert (tmp_path / "o" / "quality.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["quality", "ablations", "length", "recall"])
def test_page_shows_the_results(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = plots.PAGE.read_text()
    monkeypatch.setattr(plots, "DOCS", tmp_path)
    monkeypatch.setattr(plots, "PAGE", tmp_path / "quality.md")
    plots.PAGE.write_text(page)
    getattr(plots, f"plot_{name}")(runs.RESULT_FOLDER)
    assert plots.PAGE.read_text() == page, f"python -m benchmarks.language_modelling {name} --plot writes other tables"
    assert list(tmp_path.glob("*.png"))


def test_page_shows_the_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = plots.PAGE.read_text()
    monkeypatch.setattr(plots, "PAGE", tmp_path / "quality.md")
    plots.PAGE.write_text(page)
    plots.show_instructions(runs.RESULT_FOLDER)
    assert plots.PAGE.read_text() == page


def test_tables_need_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "PAGE", tmp_path / "page.md")
    plots.PAGE.write_text("Text.\n<!-- one -->\nold\n<!-- end -->\nMore.\n")
    plots.publish("one", [{"run": "a", "validation_2048": "1.23456"}], {"run": "run", "validation_2048": "bits"})
    shown = "| run | bits |\n| --- | --- |\n| a | 1.235 |"
    assert plots.PAGE.read_text() == f"Text.\n<!-- one -->\n\n{shown}\n\n<!-- end -->\nMore.\n"
    with pytest.raises(ValueError, match="expected a line <!-- two -->"):
        plots.publish("two", [], {"run": "run"})
