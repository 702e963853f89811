"""Quantize with llm-compressor; run by peers.py with the interpreter that has it.

rtn, gptq (act-order static) and awq are the tool as it comes. Its AWQ pins memory, which needs a
GPU and fails without one; awq-unpinned leaves that call out, to have a number all the same.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(method: str, bits: int, group_size: int, symmetric: bool) -> list[Any]:
    """The modifiers of a method."""
    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=group_size,
        dynamic=False,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    common = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**common, actorder="static", dampening_frac=0.01)]
    if method == "rtn":
        return [QuantizationModifier(**common)]
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if method == "awq-unpinned":
        from llmcompressor.pipelines.cache import IntermediatesCache

        IntermediatesCache.pin_memory = lambda *_: None
    return [AWQModifier(), QuantizationModifier(**common)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=("rtn", "gptq", "awq", "awq-unpinned"))
    parser.add_argument("model")
    parser.add_argument("windows", type=Path, help="JSON list of token lists")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data: dict[str, Any] = {}
    if args.method != "rtn":
        windows = json.loads(args.windows.read_text())
        masks = [[1] * len(window) for window in windows]
        data = {
            "dataset": Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
            "num_calibration_samples": len(windows),
            "max_seq_length": len(windows[0]),
            "shuffle_calibration_samples": False,
        }
    modifiers = recipe(args.method, args.bits, args.group_size, not args.asymmetric)
    oneshot(model=model, tokenizer=tokenizer, recipe=modifiers, **data)
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"version": version("llmcompressor")}))


if __name__ == "__main__":
    main()
