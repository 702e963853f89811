"""Run by an interpreter with vLLM; see this folder's __init__.py for what it is asked."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    """Answer one request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    longest = max(len(prompt) for prompt in request["prompts"]) + request["new_tokens"]
    llm = LLM(
        model=request["model"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=len(request["prompts"]),
        max_num_batched_tokens=len(request["prompts"]) * longest,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request["new_tokens"],
        min_tokens=request["new_tokens"],
        ignore_eos=True,
        prompt_logprobs=0,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    logprobs = [
        [row[token].logprob for token, row in zip(prompt, out.prompt_logprobs, strict=True) if row]
        for prompt, out in zip(request["prompts"], outputs, strict=True)
    ]
    tokens = [list(out.outputs[0].token_ids) for out in outputs]
    answer = {"logprobs": [row[request["first"] - 1 :] for row in logprobs], "tokens": tokens}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
