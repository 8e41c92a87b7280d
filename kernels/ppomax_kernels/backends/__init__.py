"""What runs the ops: the compiled library on CPUs and on CUDA, plain torch, and what the Triton kernels share."""
