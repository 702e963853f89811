"""Run by an interpreter with transformers; see this folder's __init__.py for what it is asked."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Answer one request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=dtype, local_files_only=True
    ).eval()
    logprobs, tokens = [], []
    with torch.no_grad():
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt])
            scores = model(input_ids=ids).logits.float().log_softmax(-1)
            own = scores[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            logprobs.append(own[request["first"] - 1 :].tolist())
            count = request["new_tokens"]
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=count, min_new_tokens=count,
            )  # fmt: skip
            tokens.append(out[0, len(prompt) :].tolist())
    answer = {"logprobs": logprobs, "tokens": tokens}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
