"""Outputs against real runtimes."""
