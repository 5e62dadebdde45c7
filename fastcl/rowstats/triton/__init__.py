"""Row statistics and losses in Triton: launches kernels/contrastive. Needs a GPU, or Triton's interpreter on a CPU."""
