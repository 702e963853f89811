"""Blocks are found without names, and what cannot be proved is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fixtures import ModelFactory
from support.models import VOCABULARY, distance, logits, make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

import bitwright
from bitwright.errors import BadCheckpoint, BadTensor, UnsupportedModel
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.inputs import shared_inputs
from bitwright.pipeline.topology import discover, load_outside, materialize, run_until_blocks


class OddConfig(PretrainedConfig):
    """A model that shares no module name with any other."""

    model_type = "oddlm"

    def __init__(self, walk: str = "plain", hidden_size: int = 64, **rest: Any) -> None:
        self.walk = walk
        self.hidden_size = hidden_size
        self.vocab_size = VOCABULARY
        super().__init__(**(rest | {"tie_word_embeddings": False}))


class Storey(nn.Module):
    """A residual block; `zig` and `zag` read the same tensor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.polish = nn.LayerNorm(size)
        self.zig = nn.Linear(size, 2 * size)
        self.zag = nn.Linear(size, 2 * size, bias=False)
        self.home = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.polish(x)
        return x + self.home(torch.tanh(self.zig(y)) * self.zag(y))


class Trunk(nn.Module):
    """Embedding and blocks; ``walk`` says in which way the blocks are visited."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.walk = config.walk
        self.lookup = nn.Embedding(config.vocab_size, config.hidden_size)
        self.storeys = nn.ModuleList(Storey(config.hidden_size) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.lookup(input_ids)
        order = {"plain": (0, 1, 2), "skip": (0, 2), "repeat": (0, 1, 1, 2), "back": (0, 2, 1)}
        if self.walk == "between":
            return self.storeys[2](self.storeys[1](self.storeys[0](x)) * 2)
        for index in order[self.walk]:
            x = self.storeys[index](x)
        return x


class OddForCausalLM(PreTrainedModel):
    """The language model around the trunk."""

    config_class = OddConfig
    base_model_prefix = "trunk"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.voice = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.lookup

    def get_output_embeddings(self) -> nn.Module:
        return self.voice

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.voice(self.trunk(input_ids)))


AutoConfig.register("oddlm", OddConfig)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM)


def _odd(folder: Path, walk: str = "plain") -> Path:
    OddForCausalLM(OddConfig(walk=walk)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_unknown_module_names_do_not_matter(method: str, text: Path, tmp_path: Path) -> None:
    folder, out = _odd(tmp_path / "odd"), tmp_path / "out"
    bitwright.quantize(
        folder,
        out,
        scheme="W8A16",
        method=method,
        calibration=str(text) if method == "gptq" else None,
        samples=8,
        sequence_length=64,
    )
    tokens = torch.arange(40)[None]
    reference, _ = bitwright.load(folder)
    quantized, _ = bitwright.load(out)
    assert 0 < distance(logits(quantized, tokens), logits(reference, tokens)) < 0.02
    assert len(bitwright.inspect(out)["left_alone"]) == 1


@pytest.mark.parametrize("walk", ["skip", "repeat", "back", "between"])
def test_blocks_that_are_not_a_plain_chain_are_refused(walk: str, tmp_path: Path) -> None:
    folder = _odd(tmp_path / "odd", walk)
    with pytest.raises(UnsupportedModel, match="OddForCausalLM"):
        bitwright.quantize(folder, tmp_path / "out", scheme="W8A16")
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_is_refused_by_its_type(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModel, match="t5"):
        bitwright.quantize(tmp_path / "t5", tmp_path / "out")


def test_weights_of_another_model_are_refused(llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(llama, tmp_path / "m")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(BadTensor, match="different models"):
        bitwright.prepare(tmp_path / "m", group_size=32)
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BadCheckpoint, match=r"layers\.2"):
        bitwright.prepare(tmp_path / "m", group_size=32)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (
            "llama",
            [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
        ),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
        ("opt", [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]),
        ("gpt-neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
    ],
)
def test_linears_fed_by_one_tensor_are_found(
    architecture: str, expected: list[set[str]], model_of: ModelFactory
) -> None:
    source = open_checkpoint(model_of(architecture))
    topology = discover(source)
    load_outside(topology, source)
    hidden, calls = run_until_blocks(topology, torch.arange(12)[None])
    names = topology.block_tensors(0)
    tensors = source.read(names.values())
    materialize(topology.model, {p: tensors[t] for p, t in names.items()}, torch.float32)
    groups = shared_inputs(topology.block(0), topology.linears[0], hidden, calls[0])
    assert [{name.rpartition(".")[2] for name in group.names} for group in groups] == expected
