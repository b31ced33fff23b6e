"""How fast the kernels are: measured on a GPU, calculated for a GPU, estimated for a TPU."""
