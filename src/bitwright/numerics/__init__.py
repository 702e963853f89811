"""Tensors and grid values only: no modules, no files, no logging."""
