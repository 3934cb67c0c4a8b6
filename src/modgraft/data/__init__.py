"""Data: DigitsQA, ScienceQA and other data sets, text forms, batches, tokenizers."""
