"""Checkpoints of quantised models of transformers: written from converted models, and loaded again."""
