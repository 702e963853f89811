"""Benchmark tasks through lm-eval (EleutherAI's evaluation harness), if it is installed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitwright.errors import BadRequest


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 1,
    progress: Callable[[str], None] = lambda note: None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, standard errors (``..._stderr``) and sample counts included.

    ``tasks``: names that lm-eval knows, or YAML task files; a file's ``data_files`` are relative to
    it, so a task whose data lies beside it needs no network. ``limit``: so many documents per
    task; ``shots``: examples in the prompt, None for the task's own number. Raises BadRequest.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadRequest(
            f"--tasks needs lm-eval: pip install 'bitwright[eval]' ({error})"
        ) from error
    wanted: list[Any] = [_task_file(Path(t)) if _is_file(t) else t for t in tasks]
    manager = TaskManager()
    names = [task for task in wanted if isinstance(task, str)]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise BadRequest(
            f"lm-eval knows no task {unknown[0]!r}, and there is no such file; list them with: "
            "lm-eval ls tasks"
        )
    progress(f"{len(wanted)} tasks")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=wanted,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BadRequest(f"lm-eval could not run {', '.join(tasks)}: {first}") from error
    counts = found.get("n-samples", {})
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        | ({"samples": float(counts[task]["effective"])} if task in counts else {})
        for task, values in found["results"].items()
    }


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _task_file(path: Path) -> dict[str, Any]:
    """A task's configuration, its data files made absolute; code (!function) is refused.

    Raises BadRequest.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"cannot read task file {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise BadRequest(f"{path} is not plain YAML (code is not run): {first}") from error
    if not isinstance(config, dict) or "task" not in config:
        raise BadRequest(f"{path} is not a task of lm-eval: it names no task")
    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        config["dataset_kwargs"] = options | {
            "data_files": _absolute(options["data_files"], path.resolve().parent)
        }
    return config


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(part, folder) for split, part in files.items()}
    if isinstance(files, list):
        return [_absolute(part, folder) for part in files]
    return str(files) if "://" in str(files) else str(folder / str(files))
