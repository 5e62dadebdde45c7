"""Row statistics and losses in Triton: kernels/contrastive, launched. Needs a GPU, or Triton's interpreter on a CPU."""
