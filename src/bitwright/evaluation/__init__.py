"""Judging a model: perplexity, and divergence from the original."""
