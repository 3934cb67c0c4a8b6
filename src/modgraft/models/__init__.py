"""Small models to start from: a T5 that can copy, an eye for digits."""
