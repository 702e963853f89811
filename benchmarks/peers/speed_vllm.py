"""Run by an interpreter with vLLM: seconds to write tokens, as JSON on the last line."""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    """One stream, greedy."""
    model, ids, tokens, rounds, _ = (json.loads(word) for word in sys.argv[1:])
    llm = LLM(
        model=model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
    )
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        (out,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        assert len(out.outputs[0].token_ids) == tokens
    print(json.dumps({"seconds": seconds[1:]}))


if __name__ == "__main__":
    main()
