"""Run by an interpreter with xllamacpp: seconds to write tokens, as JSON on the last line."""

import json
import sys
import time
import urllib.request

import xllamacpp

model, ids, tokens, rounds, threads = (json.loads(word) for word in sys.argv[1:])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx = 512
params.n_parallel = 1
params.cpuparams.n_threads = threads
server = xllamacpp.Server(params)
question = {"prompt": ids, "n_predict": tokens, "ignore_eos": True, "temperature": 0.0,
            "cache_prompt": False, "return_tokens": True}  # fmt: skip
seconds = []
for _ in range(rounds + 1):
    call = urllib.request.Request(
        server.listening_address + "/completion",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    with urllib.request.urlopen(call) as response:
        answer = json.loads(response.read())
    seconds.append(time.perf_counter() - start)
    assert len(answer["tokens"]) == tokens
print(json.dumps({"seconds": seconds[1:]}))
