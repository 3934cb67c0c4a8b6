"""Characters or byte pairs: a larger code book and fewer tokens, or the other way round."""
