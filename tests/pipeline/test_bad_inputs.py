"""Bad inputs: one clear line on stderr, exit code 2, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import Ran, run_apart, run_here
from support.models import make_model

import bitwright
from bitwright.errors import NoSpace

Run = Callable[..., Ran]
SHARD = "model.safetensors"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_here(monkeypatch, capsys, *arguments)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, free to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def _refused(ran: Ran, *words: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("bitwright: ")
    for word in words:
        assert word in ran.err


def _only_model_left(tmp_path: Path) -> None:
    assert [path.name for path in tmp_path.iterdir() if path.name != "model"] == []


def _quantize(run: Run, model: Path, *options: object) -> Ran:
    return run("quantize", model, model.parent / "out", "--group-size", 32, *options)


def test_a_missing_folder(run: Run, tmp_path: Path) -> None:
    _refused(_quantize(run, tmp_path / "model"), "does not exist")
    _refused(run("evaluate", tmp_path / "model"), "does not exist")
    _refused(run("inspect", tmp_path / "model"), "does not exist")
    _refused(run("generate", tmp_path / "model", "hello"), "does not exist")
    _only_model_left(tmp_path)


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    _refused(run_apart("quantize", tmp_path / "absent", tmp_path / "out"), "does not exist")


def test_no_config(run: Run, model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    _refused(_quantize(run, model), "has no config.json")
    (model / "config.json").write_text("{not json")
    _refused(_quantize(run, model), "cannot be read as JSON")
    (model / "config.json").write_text("[]")
    _refused(_quantize(run, model), "not a JSON object")
    (model / "config.json").write_text("{}")
    _refused(_quantize(run, model), "no model_type")
    (model / "config.json").write_text('{"model_type": "unheard-of"}')
    _refused(_quantize(run, model), "unheard-of")
    _only_model_left(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.3, 0.999])
def test_a_truncated_shard(run: Run, model: Path, keep: float, tmp_path: Path) -> None:
    data = (model / SHARD).read_bytes()
    size = int(keep if isinstance(keep, int) else len(data) * keep)
    (model / SHARD).write_bytes(data[:size])
    _refused(_quantize(run, model), "not a complete safetensors file", SHARD)
    _only_model_left(tmp_path)


def test_a_shard_of_noise(run: Run, model: Path) -> None:
    (model / SHARD).write_bytes(bytes(range(256)) * 64)
    _refused(_quantize(run, model), "not a complete safetensors file", SHARD)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_that_is_not_finite(
    run: Run, model: Path, name: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(model / SHARD).items()}
    tensors[name].view(-1)[7] = value
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    _refused(_quantize(run, model), name, "1 NaN or infinite")
    _only_model_left(tmp_path)


def test_large_but_finite_weights_are_accepted(run: Run, model: Path) -> None:
    tensors = load_file(model / SHARD)
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    assert _quantize(run, model, "--quiet").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "W5"), ("unknown scheme 'W5'", "W4A16", "NVFP4")),
        (("--method", "magic"), ("unknown method 'magic'", "rtn", "gptq")),
        (("--format", "zip"), ("unknown format 'zip'", "compressed-tensors")),
        (("--search", "luck"), ("unknown scale search 'luck'", "mse")),
        (("--group-size", "48"), ("48 does not divide", "64, 32, 16")),
        (("--group-size", "many"), ("'many' is not auto, -1 or a number",)),
        (("--group-size", "0"), ("--group-size 0",)),
        (("--group-size", "-2"), ("--group-size -2",)),
        (("--ignore", "nothing_like_this"), ("matches no layer",)),
        (("--ignore", "("), ("not a regular expression",)),
        (("--ignore", "."), ("leaves no layer",)),
        (("--calibration", "absent.txt"), ("absent.txt", "not a file")),
    ],
    ids=lambda value: "-".join(map(str, value))[:40],
)
def test_a_request_that_cannot_be(
    run: Run, model: Path, options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    _refused(_quantize(run, model, *options), *words)
    _only_model_left(tmp_path)


def test_cuda_that_is_not_there(run: Run, model: Path) -> None:
    _refused(_quantize(run, model, "--device", "cuda"), "no CUDA device")


def test_an_output_that_exists(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("kept")
    _refused(_quantize(run, model), "exists", "--overwrite")
    assert (tmp_path / "out/precious").read_text() == "kept"
    assert _quantize(run, model, "--overwrite", "--quiet").code == 0
    assert not (tmp_path / "out/precious").exists()
    assert (tmp_path / "out" / SHARD).exists() or list((tmp_path / "out").glob("*.safetensors"))


def test_the_model_is_never_its_own_output(run: Run, model: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in model.iterdir())
    _refused(run("quantize", model, model, "--overwrite", "--quiet"), "the model itself")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in model.iterdir()) == before


def test_a_failed_overwrite_keeps_the_old_output(run: Run, model: Path, tmp_path: Path) -> None:
    assert _quantize(run, model, "--quiet").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tensors = load_file(model / SHARD)
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    _refused(_quantize(run, model, "--overwrite"), "lm_head.weight")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_pickles(run: Run, model: Path, tmp_path: Path) -> None:
    torch.save(load_file(model / SHARD), model / "pytorch_model.bin")
    (model / SHARD).unlink()
    _refused(_quantize(run, model), "pickle", "refused")
    _refused(run("quantize", model / "pytorch_model.bin", tmp_path / "out"), "pickle", "refused")
    (model / "pytorch_model.bin").unlink()
    _refused(_quantize(run, model), "no .safetensors file")
    _only_model_left(tmp_path)


def test_broken_indexes(run: Run, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", shard="100KB")
    index = model / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    files = sorted(set(good["weight_map"].values()))
    assert len(files) > 1
    first = next(iter(good["weight_map"]))
    for value, words in (
        ({}, ("no weight_map",)),
        ({"weight_map": good["weight_map"] | {first: "../secret"}}, ("outside the folder",)),
        ({"weight_map": good["weight_map"] | {first: "absent.safetensors"}}, ("is missing",)),
        ({"weight_map": good["weight_map"] | {"extra.weight": files[0]}}, ("lacks", "extra")),
    ):
        index.write_text(json.dumps(value))
        _refused(_quantize(run, model), *words)
    _only_model_left(tmp_path)


def test_files_that_are_not_gguf(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_bytes(b"something else")
    _refused(run("quantize", file, tmp_path / "out"), "not a GGUF file")


def test_a_damaged_gguf(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    _refused(run("quantize", file, tmp_path / "out"), "cannot be read as a GGUF model")
    assert not (tmp_path / "cache").exists()


def test_code_that_comes_with_a_model_is_not_run(run: Run, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    _refused(_quantize(run, model), "strange", "--trust-remote-code")
    assert not (tmp_path / "ran").exists()


def test_a_quantization_nobody_knows(run: Run, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "abacus"}
    (model / "config.json").write_text(json.dumps(config))
    _refused(run("inspect", model), "abacus", "compressed-tensors")


def test_no_tokenizer(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()
    _refused(_quantize(run, model, "--method", "gptq", "--calibration", text), "tokenizer")
    _only_model_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short.txt", "too short", ("tokens, fewer than one sample",)),
        ("empty.txt", "", ("0 tokens",)),
        ("bad.jsonl", '{"text": "fine"}\n{oops', ("not JSON",)),
        ("other.jsonl", '{"body": "no text field"}', ("'text' field",)),
    ],
)
def test_no_usable_text(
    run: Run, model: Path, name: str, content: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "model"  # so that nothing but the model is left
    (folder / name).write_text(content)
    options = ("--method", "gptq", "--calibration", folder / name, "--sequence-length", 64)
    _refused(_quantize(run, model, *options), *words)
    if name != "short.txt":
        words = tuple(word for word in words if "sample" not in word)
    else:
        words = ("fewer than one window",)
    _refused(run("evaluate", model, "--text", folder / name), *words)
    _only_model_left(tmp_path)


# A full disk


@pytest.fixture(params=["256k"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of that size."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("NOT TESTED: a really full disk needs root on Linux to mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: no small tmpfs could be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_disk_too_small_is_seen_before_any_work(run: Run, llama: Path, small_disk: Path) -> None:
    _refused(run("quantize", llama, small_disk / "out", "--quiet"), "MB free")
    assert list(small_disk.iterdir()) == []


_DRIVER = """
import sys
import bitwright.pipeline.run as run
run.require_space = lambda target, needed: None  # as if others filled the disk meanwhile
sys.argv = ["bitwright", *sys.argv[1:]]
from bitwright.cli import main
main()
"""


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_disk_that_fills_up_on_the_way(
    method: str, llama: Path, text: Path, small_disk: Path
) -> None:
    options = ["--method", method, "--group-size", "32", "--samples", "16"]
    if method == "gptq":  # hidden states of 16 * 128 tokens * 64 channels fill it at once
        options += ["--calibration", str(text), "--sequence-length", "128"]
    command = [sys.executable, "-c", _DRIVER, "quantize", str(llama), str(small_disk / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    _refused(Ran(done.returncode, done.stdout, done.stderr), "is full")
    assert not (small_disk / "out").exists()
    left = [path.name for path in small_disk.iterdir()]
    assert left == [] if method == "gptq" else sorted(left) == [".out.partial", ".out.work"]
    larger = ["mount", "-o", "remount,size=8m", str(small_disk)]
    subprocess.run(larger, check=True)
    subprocess.run([*command, *options, "--resume"], check=True, capture_output=True)
    whole = subprocess.run(
        [*command[:-1], str(small_disk / "whole"), *options], check=False, capture_output=True
    )
    assert whole.returncode == 0
    assert contents(small_disk / "out") == contents(small_disk / "whole")
    assert sorted(p.name for p in small_disk.iterdir() if p.is_dir()) == ["out", "whole"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_no_space_at_any_shard_can_be_resumed(
    after: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitwright.pipeline.writer as writer

    written = []
    real = writer.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path, **rest: object) -> None:
        if len(written) == after:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "save_file", save)
    with pytest.raises(NoSpace, match="full"):
        bitwright.quantize(llama, tmp_path / "out")
    assert len(written) == after
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ([".out.partial", ".out.work"] if after else [])
    monkeypatch.setattr(writer, "save_file", real)
    bitwright.quantize(llama, tmp_path / "out", resume=True)
    bitwright.quantize(llama, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
