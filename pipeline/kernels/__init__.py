"""Arithmetic that torch lacks or does slowly: small kernels in C, each with a torch path that needs no compiler."""
