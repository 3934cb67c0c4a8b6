"""Words that every room shares: sites, expressions, layers, the call under way, errors."""
