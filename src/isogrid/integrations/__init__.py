"""Quantization-aware training in the loops that people already use: transformers and TRL, Lightning, Accelerate."""
