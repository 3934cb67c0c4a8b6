"""The ladder: how much of a host has to change, against what that costs."""
