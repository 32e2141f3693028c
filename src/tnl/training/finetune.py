"""`tnl finetune`: supervised fine-tuning on instructions with TRL, of all weights or of LoRA adapters with peft.

The prompt is that of the released TransNormerLLM models; only the answer and the token that ends it are learnt.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from tnl.training.config import FinetuneSettings, require
from tnl.training.model import choose_device, load_model, save_model

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def instruction_prompt(instruction: str, given: str = "") -> str:
    """The text that asks for an answer, as the released models know it.

    Args:
        instruction: What is to be done.
        given: What it is to be done with.
    """
    return f"{instruction}\nHuman:\n{given}\nAssistant:\n"


def finetune(settings: FinetuneSettings) -> Path:
    """Fine-tune a model on a file of instructions and write it.

    Returns:
        The Hugging Face folder of the model, adapters merged into it.

    Raises:
        ValueError: The packages trl or peft are not installed, or the data has not the columns it needs.
        OSError: Model or data cannot be read, or a result cannot be written.
    """
    try:
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ValueError(f"expected trl and peft, which `pip install 'tnl[finetune]'` installs ({error})") from error

    device = choose_device(settings.device)
    output = Path(settings.output)
    model, tokenizer = load_model(settings.model, device, "float32")
    examples = read_examples(settings.data, tokenizer, settings.longest)
    arguments = SFTConfig(
        output_dir=str(output / "trainer"),
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        num_train_epochs=settings.epochs,
        max_length=settings.longest,
        completion_only_loss=True,  # else the mask of answers is left aside
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        gradient_checkpointing=False,
    )
    adapters = None
    if settings.lora_rank:
        rank = settings.lora_rank
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, arguments, train_dataset=examples, processing_class=tokenizer, peft_config=adapters
    )  # fmt: skip
    trainer.train()
    tuned: Any = trainer.model
    if adapters is not None:
        tuned.save_pretrained(str(output / "adapter"))
        tuned = tuned.merge_and_unload()
    folder = output / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(tuned, tokenizer, folder)
    return folder


def read_examples(data: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> "Dataset":
    """Tokens of the examples and which of them are learnt: columns `input_ids` and `completion_mask`.

    Raises:
        ValueError: An unknown kind of file, a missing column, or no example.
        FileNotFoundError: There is no such file.
    """
    import datasets

    path = Path(data)
    require("data", data, path.suffix in FORMATS, f"a file of {', '.join(FORMATS)}")
    if not path.is_file():
        raise FileNotFoundError(f"data: expected a file of instructions, found none at {data}")
    try:
        rows = datasets.load_dataset(FORMATS[path.suffix], data_files=data, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"data: expected rows with instruction and output in {data} ({error})") from error
    missing = {"instruction", "output"} - set(rows.column_names)
    require("data", sorted(rows.column_names), not missing and len(rows) > 0, "rows with instruction and output")

    def tokens(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = tokenizer(instruction_prompt(row["instruction"], row.get("input") or ""))["input_ids"]
        answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        mask = [0] * len(prompt) + [1] * len(answer)
        return {"input_ids": [*prompt, *answer][:longest], "completion_mask": mask[:longest]}

    return rows.map(tokens, remove_columns=rows.column_names)
