"""Pure functions, one file per paper: weights and statistics in, QuantizedLinear out."""
