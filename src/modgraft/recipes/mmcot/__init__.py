"""Multimodal chain of thought: T5 with gated image fusion, trained in two stages."""
