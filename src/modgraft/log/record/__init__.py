"""Writing notes: by hand through commands, and by runs of themselves."""
