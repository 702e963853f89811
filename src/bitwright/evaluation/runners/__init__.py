"""Scripts for the interpreters of other runtimes. None of them imports bitwright.

Each is run as ``python SCRIPT REQUEST.json ANSWER.json``. The request is {"model": path, "dtype":
name, "prompts": [[token id, ...], ...], "first": N, "new_tokens": M, "vocabulary": V, "text":
string}; the answer {"logprobs": [[float, ...], ...], "tokens": [[token id, ...], ...]}: the
log-probability of each prompt's tokens from number N on, and M greedy tokens after it. llama.cpp
also answers {"ids": [token id, ...]}, the text as it splits it.
"""
