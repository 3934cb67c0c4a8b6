"""A soft prompt beside examples in the text, against either alone."""
