"""Data: DigitsQA, ScienceQA, text forms, batches, tokenizers."""
