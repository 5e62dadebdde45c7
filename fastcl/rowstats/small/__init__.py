"""Row statistics and losses of few rows on a CPU: the whole matrix at once."""
