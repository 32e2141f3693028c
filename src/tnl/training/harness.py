"""`tnl eval --harness`: the tasks of lm-evaluation-harness on the folder of any model."""

import csv
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tnl.training.config import EvaluationSettings
from tnl.training.model import choose_device, load_model

COLUMNS = ("task", "metric", "filter", "value", "standard_error", "examples")


def evaluate_tasks(settings: EvaluationSettings) -> list[dict[str, Any]]:
    """Run the tasks that `settings.harness` names; print a table and write the files that the settings name.

    Returns:
        A row for each task and metric, with the fields of `COLUMNS`.

    Raises:
        ValueError: The package lm-eval is not installed, or there is no such task.
        OSError: The model cannot be read, or a result cannot be written.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        message = f"harness: expected the package lm-eval, which `pip install 'tnl[eval]'` installs ({error})"
        raise ValueError(message) from error

    assert settings.harness is not None
    tasks = [name.strip() for name in settings.harness.split(",") if name.strip()]
    files = [Path(name) for name in tasks if name.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"harness: expected a file that describes a task, found none at {file}")
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    unknown = [name for name in tasks if not name.endswith((".yaml", ".yml")) and not manager.match_tasks([name])]
    if unknown or not tasks:
        raise ValueError(f"harness: expected tasks of lm-evaluation-harness or YAML files, got {settings.harness!r}")
    model, tokenizer = load_model(settings.model, choose_device(settings.device), settings.dtype)
    adapter = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=settings.window
    )  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=adapter,
        tasks=list(tasks),
        task_manager=manager,
        limit=settings.harness_examples or None,
        log_samples=False,
    )
    rows = read_rows(found)
    show(settings.model, rows)
    if settings.json:
        result = {"model": settings.model, "harness": lm_eval.__version__, "results": rows}
        Path(settings.json).write_text(json.dumps(result, indent=1) + "\n")
    if settings.csv:
        with Path(settings.csv).open("w", newline="") as file_out:
            table = csv.DictWriter(file_out, COLUMNS)
            table.writeheader()
            table.writerows(rows)
    return rows


def read_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of all tasks in what the harness returns, whose keys are `metric,filter`."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            examples = found.get("n-samples", {}).get(task, {}).get("effective")
            values = (task, metric, chosen, float(value), error if isinstance(error, float) else None, examples)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def show(model: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table on standard output."""
    table = Table(title=model)
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="left" if column in COLUMNS[:3] else "right")
    for row in rows:
        cells = (row[column] for column in COLUMNS)
        table.add_row(*("" if x is None else f"{x:.4f}" if isinstance(x, float) else str(x) for x in cells))
    Console().print(table)
