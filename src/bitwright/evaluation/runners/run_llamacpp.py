"""Run by an interpreter with xllamacpp; see this folder's __init__.py for what it is asked.

The server of llama.cpp tells probabilities of generated tokens only, so every prompt is scored
one prefix at a time.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def main() -> None:
    """Answer one request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.warmup = False
    server = xllamacpp.Server(params)

    def ask(path: str, question: dict[str, Any]) -> Any:
        body = json.dumps(question).encode()
        call = urllib.request.Request(
            server.listening_address + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call) as response:
            return json.loads(response.read())

    def complete(prompt: list[int], **settings: Any) -> Any:
        return ask("/completion", {"prompt": prompt, "temperature": 0.0, **settings})

    logprobs, tokens = [], []
    for prompt in request["prompts"]:
        row = []
        for stop in range(request["first"], len(prompt)):
            answer = complete(prompt[:stop], n_predict=1, n_probs=request["vocabulary"])
            (step,) = answer["completion_probabilities"]
            top = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
            row.append(top[prompt[stop]])
        logprobs.append(row)
        answer = complete(
            prompt, n_predict=request["new_tokens"], return_tokens=True, ignore_eos=True
        )
        tokens.append(answer["tokens"])
    ids = ask("/tokenize", {"content": request["text"]})["tokens"]
    out = {"logprobs": logprobs, "tokens": tokens, "ids": ids}
    Path(sys.argv[2]).write_text(json.dumps(out), encoding="utf-8")


if __name__ == "__main__":
    main()
