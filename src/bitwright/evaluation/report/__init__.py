"""One self-contained HTML page about one or many quantized checkpoints."""
