"""Does rounding learned inside each block help, before or in place of tuning all scales end to end?

Every block is solved by --method; then the codes (and the scales) of its Linears are learned
against what the unquantized block puts out, by the sign of the gradient (SignRound, Cheng et al.
2023, arXiv:2309.05516): a code is the rounded value of a number that starts where the weight over
its scale lies, or as near to it as still gives the solver's code. One batch of samples
never trains; where its error does not fall, the solver's codes stay.

    python benchmarks/blockwise.py --model REFERENCE --text test.txt --calibration valid.txt \
        --methods gptq gptq+tune --steps 0 40
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, Table
from torch import Tensor, nn

from bitwright import api
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.straight_through import pass_through
from bitwright.pipeline.block import Work, advance_quantized, load_block, observe, solve
from bitwright.pipeline.calibrate import HiddenStates
from bitwright.pipeline.run import Finished
from bitwright.pipeline.topology import call_block, layer_name, release
from bitwright.schemes.quantized import QuantizedLinear


class LearnedLinear(nn.Module):
    """A Linear with symmetric integer codes whose rounding and scales are learned."""

    def __init__(self, q: QuantizedLinear, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        assert isinstance(q.spec.grid, IntGrid)
        assert q.zero_point_RG is None
        self.q, self.bias_O, self.dtype = q, bias_O, weight_OI.dtype
        self.bounds = float(q.spec.grid.lowest), float(q.spec.grid.highest)
        scale_OG = q.scale_RG.float()
        level_OI = decode(q.codes_OI, q.spec.grid)
        wanted_OI = weight_OI.float() / scale_OG.repeat_interleave(self.width, 1)
        near_OI = wanted_OI.clamp(level_OI - 0.49, level_OI + 0.49)
        self.place_OI = nn.Parameter(near_OI)
        self.log_scale_OG = nn.Parameter(torch.zeros_like(scale_OG))

    @property
    def width(self) -> int:
        """Columns of a group."""
        return self.q.shape[1] // self.q.scale_RG.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        level_OI = pass_through(self.place_OI, self.place_OI.round().clamp(*self.bounds))
        scale_OG = self.q.scale_RG.float() * self.log_scale_OG.exp()
        weight_OI = level_OI * scale_OG.repeat_interleave(self.width, 1)
        return nn.functional.linear(x, weight_OI.to(self.dtype), self.bias_O)

    def result(self) -> QuantizedLinear:
        """The learned codes and scales."""
        level_OI = self.place_OI.detach().round().clamp(*self.bounds)
        scale_OG = self.q.scale_RG.float() * self.log_scale_OG.detach().exp()
        codes_OI = encode(level_OI, self.q.spec.grid)
        return replace(self.q, codes_OI=codes_OI, scale_RG=scale_OG.to(self.q.scale_RG.dtype))


class Blockwise:
    """The engine: solve a block, learn its rounding, go on."""

    def __init__(self, args: argparse.Namespace, steps: int, folder: Path) -> None:
        self.args, self.steps, self.folder = args, steps, folder
        self.gains: list[float] = []
        self.twin: HiddenStates | None = None

    def __call__(
        self, work: Work, hidden: Any, true: Any, indices: range, progress: Any
    ) -> Iterator[Finished]:
        """`pipeline.run.blocks_here` with one more step."""
        for index in indices:
            tensors = work.source.read(work.topology.block_tensors(index).values())
            block = load_block(work, index, tensors)
            wanted = hidden
            if self.args.target == "original":
                wanted = self.original(work, hidden)
            with torch.no_grad():
                batches = wanted.batches(index)
                target_NTD = torch.cat([call_block(block, b, call) for _, b, call in batches])
            if self.args.target == "original":
                for where, _, _ in wanted.batches(index):
                    wanted.put(where, target_NTD[where])
                wanted.turn()
            first = next(hidden.batches(index))
            observed = observe(work, index, hidden, None, first)
            solved, layers = solve(work, index, tensors, observed, first)
            if self.steps:
                codes = self.learn(work, index, hidden, target_NTD, solved.codes)
                solved = replace(solved, codes=codes)
            advance_quantized(work, index, hidden, solved)
            release(block)
            yield Finished(solved.on_cpu(), layers, 0)

    def original(self, work: Work, hidden: HiddenStates) -> HiddenStates:
        """States that advance by the unquantized blocks."""
        if self.twin is None:
            self.twin = hidden.twin(self.folder / "original")
        return self.twin

    def learn(
        self,
        work: Work,
        index: int,
        hidden: HiddenStates,
        target_NTD: Tensor,
        codes: dict[str, QuantizedLinear],
    ) -> dict[str, QuantizedLinear]:
        """Better codes for one block whose folds, if any, are none of our business: gptq only."""
        block, model = work.topology.block(index), work.topology.model
        learned: dict[str, LearnedLinear] = {}
        places: list[tuple[nn.Module, str, nn.Module]] = []
        for module, linear in work.topology.linears[index].items():
            if (name := layer_name(work.topology, module)) in codes:
                learned[name] = LearnedLinear(codes[name], linear.weight.detach(), linear.bias)
                owner, _, leaf = module.rpartition(".")
                places.append((model.get_submodule(owner), leaf, linear))
                setattr(places[-1][0], leaf, learned[name])
        inputs_NTD = torch.cat([batch for _, batch, _ in hidden.batches(index)])
        generator = torch.Generator().manual_seed(index)
        shuffled = torch.randperm(len(inputs_NTD), generator=generator)
        size = hidden.batch
        judges, pupils = shuffled[:size], shuffled[size:]
        call = hidden.calls(index)[size]

        def error(samples: Tensor) -> Tensor:
            out = call_block(block, inputs_NTD[samples], call)
            return (out.float() - target_NTD[samples].float()).square().mean()

        places_of = [layer.place_OI for layer in learned.values()]
        scales = [layer.log_scale_OG for layer in learned.values()]
        adam = torch.optim.Adam(scales, lr=self.args.scale_rate, betas=(0.9, 0.99))
        with torch.no_grad():
            before = float(error(judges))
        for step in range(self.steps):
            left = 1 - step / self.steps
            chosen = pupils[torch.randperm(len(pupils), generator=generator)[:size]]
            error(chosen).backward()
            adam.param_groups[0]["lr"] = self.args.scale_rate * left
            adam.step()
            with torch.no_grad():
                for place_OI in places_of:
                    assert place_OI.grad is not None
                    place_OI -= self.args.rate * left * place_OI.grad.sign()
            for parameter in (*places_of, *scales):
                parameter.grad = None
        with torch.no_grad():
            after = float(error(judges))
        for owner, leaf, linear in places:
            setattr(owner, leaf, linear)
        self.gains.append(after / before)
        print(f"block {index}: held-out error {before:.3e} -> {after:.3e}", flush=True)
        if not after < before:
            return codes
        return {name: learned[name].result() if name in learned else q for name, q in codes.items()}


def measure(args: argparse.Namespace, scheme: str, method: str, steps: int) -> Row:
    """Quantize and score one row."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        engine = Blockwise(args, steps, Path(folder))
        start = time.perf_counter()
        api.quantize(
            args.model, Path(folder) / "out", engine=engine,
            scheme=scheme, method=method, group_size=64, calibration=args.calibration,
            samples=args.samples, sequence_length=512,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        scores = api.evaluate(
            Path(folder) / "out", text=args.text, windows=args.windows, sequence_length=1024
        )
    return {
        "perplexity": scores.perplexity,
        "seconds": round(seconds, 1),
        "held_out_error": sum(engine.gains) / max(1, len(engine.gains)),
    }


def main() -> None:
    """Every method with every number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--schemes", nargs="+", default=["W4A16"])
    parser.add_argument("--methods", nargs="+", default=["gptq", "gptq+tune"])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 40])
    parser.add_argument("--rate", type=float, default=0.001, help="largest step of a code's place")
    parser.add_argument("--scale-rate", type=float, default=1e-3)
    parser.add_argument("--target", choices=("block", "original"), default="block",
                        help="a block's output on the same inputs, or in the model")  # fmt: skip
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--name", default="blockwise")
    args = parser.parse_args()
    results = Results(args.name)
    table = Table(
        ("scheme", 8, ""), ("method", 10, ""), ("steps", 6, "d"), ("target", 9, ""),
        ("perplexity", 10, ".2f"), ("held out", 9, ".3f"), ("s", 6, ".0f"),
    )  # fmt: skip
    for scheme in args.schemes:
        for method in args.methods:
            for steps in args.steps:
                key: Row = {"scheme": scheme, "method": method, "steps": steps,
                            "target": args.target, "rate": args.rate,
                            "scale_rate": args.scale_rate, "samples": args.samples}  # fmt: skip
                row = results.find(key) or measure(args, scheme, method, steps)
                results.add(key, row)
                table.row(
                    scheme, method, steps, args.target, row["perplexity"],
                    row["held_out_error"], row["seconds"],
                )  # fmt: skip


if __name__ == "__main__":
    main()
