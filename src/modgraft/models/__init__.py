"""Small models for recipes: a T5 that can copy, a vision model for digits, a bag of words."""
