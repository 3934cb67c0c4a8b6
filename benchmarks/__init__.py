"""One file a claim, side by side in one run; times are compared as ratios, never alone."""
