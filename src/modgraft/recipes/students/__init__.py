"""Small models at equal time: from the start, distilled, pruned from a large one, with experts."""
