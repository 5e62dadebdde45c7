"""All checks and benchmarks that need a GPU, with one command."""
