"""The C++ kernels of CPUs: built, loaded, chosen."""
