"""Lion and Muon against AdamW, each at the best of its learning rates."""
