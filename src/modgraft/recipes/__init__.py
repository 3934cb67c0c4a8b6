"""Recipes: experiments from papers, each written on top of the library."""
