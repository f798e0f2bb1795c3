"""A pretended CUDA card for a CPU build of torch: tensors that say "cuda:0", and have their numbers on the CPU."""
