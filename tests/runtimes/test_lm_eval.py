"""Tasks through the real lm-eval, with a task file and data on this disk and no network."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import bitwright
from runtimes.conftest import NOTES
from runtimes.environment import CannotInstallError
from runtimes.eval_environment import eval_python

pytestmark = pytest.mark.runtime

TASK = """
task: which_ending
dataset_path: json
dataset_kwargs:
  data_files:
    test: endings.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{endings}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
DOCUMENTS = [
    {"start": "A quick brown", "endings": [" fox", " heat", " shells"], "answer": 0},
    {"start": "The second law says that heat", "endings": [" lazy", " flows"], "answer": 1},
    {"start": "She sold seven", "endings": [" dog", " shells", " bits", " cold"], "answer": 1},
    {"start": "Numbers are stored in few", "endings": [" bits", " times"], "answer": 0},
    {"start": "by the sea; he counted", "endings": [" them", " rains"], "answer": 0},
]


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return eval_python()
    except CannotInstallError as error:
        NOTES.append(f"SKIPPED, NOTHING WAS TESTED WITH lm-eval: it cannot be installed.\n{error}")
        pytest.skip("lm-eval cannot be installed here; see 'real runtimes' in the summary")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    lines = "\n".join(json.dumps(document) for document in DOCUMENTS)
    (folder / "endings.jsonl").write_text(lines, encoding="utf-8")
    (folder / "which_ending.yaml").write_text(TASK, encoding="utf-8")
    return folder / "which_ending.yaml"


def _run(python: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    source = str(Path(bitwright.__file__).parents[1])
    offline = {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
               "HF_HOME": str(folder / "cache")}  # fmt: skip
    command = [python, "-m", "bitwright.cli", "evaluate", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | offline, cwd=folder, check=False
    )


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "q"
    bitwright.quantize(llama, out)
    return out


def _right(model: Path) -> float:
    """The share of documents whose most likely ending is the answer, computed here."""
    network, tokenizer = bitwright.load(model)
    hits = 0
    for document in DOCUMENTS:
        scores = []
        for ending in document["endings"]:  # type: ignore[attr-defined]
            start = tokenizer(document["start"], return_tensors="pt")["input_ids"]
            whole = tokenizer(f"{document['start']}{ending}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = network(whole).logits[0].float().log_softmax(-1)
            steps = range(start.shape[1] - 1, whole.shape[1] - 1)
            scores.append(sum(float(logs[i, whole[0, i + 1]]) for i in steps))
        hits += max(range(len(scores)), key=scores.__getitem__) == document["answer"]
    return hits / len(DOCUMENTS)


def test_a_local_task_offline(python: Path, task: Path, quantized: Path, tmp_path: Path) -> None:
    done = _run(python, tmp_path, quantized, "--tasks", task, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found.keys() == {"tasks"}
    metrics = found["tasks"]["which_ending"]
    assert metrics["acc"] == pytest.approx(_right(quantized))
    assert metrics["samples"] == 5
    assert metrics["acc_stderr"] >= 0


def test_tasks_beside_perplexity(
    python: Path, task: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    done = _run(python, tmp_path, llama, "--tasks", task, "--limit", 2, "--text", text,
                "--windows", 2, "--sequence-length", 32, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tasks"]["which_ending"]["samples"] == 2
    assert found["perplexity"] > 1


def test_refusals_are_one_line(python: Path, llama: Path, tmp_path: Path) -> None:
    code = tmp_path / "code.yaml"
    code.write_text("task: x\nprocess: !function utils.run\n", encoding="utf-8")
    for task, words in (("unheard_of", "knows no task"), (code, "code is not run"),
                        (tmp_path / "missing.yaml", "cannot read task file")):  # fmt: skip
        done = _run(python, tmp_path, llama, "--tasks", task, "--json")
        assert done.returncode == 2
        assert done.stdout == ""
        assert words in done.stderr.splitlines()[-1]
