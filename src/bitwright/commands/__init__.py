"""Commands that are more than one call: the composition root beside cli.py, one file each."""
