"""Writing notes: by hand through commands, and automatically by runs."""
