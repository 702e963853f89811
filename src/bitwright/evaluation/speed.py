"""How many tokens per second a model writes here, alone."""

import time
from typing import Any

import torch
from torch import Tensor

PROMPT, TOKENS, ROUNDS = 16, 32, 3


def seconds_to_write(model: Any, prompt_1T: Tensor, tokens: int) -> float:
    """Seconds of one greedy generation of exactly ``tokens`` tokens."""
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == prompt_1T.shape[1] + tokens
    return time.perf_counter() - start


def tokens_per_second(model: Any, text_T: Tensor) -> float:
    """Of the fastest of a few greedy generations that go on from the start of a text."""
    prompt_1T = text_T[None, :PROMPT]
    seconds_to_write(model, prompt_1T, 2)
    return TOKENS / min(seconds_to_write(model, prompt_1T, TOKENS) for _ in range(ROUNDS))
