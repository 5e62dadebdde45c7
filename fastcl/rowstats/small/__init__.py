"""Row statistics and losses of small batches on a CPU, from the whole matrix at once."""
