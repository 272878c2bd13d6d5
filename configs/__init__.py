"""Configs: `get_config(variant)` and nothing else."""
