"""What needs a GPU, with one command."""
