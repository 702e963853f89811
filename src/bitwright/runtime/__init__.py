"""Quantized checkpoints as transformers models."""
