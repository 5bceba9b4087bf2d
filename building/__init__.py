"""Builds the native code; setup.py uses it. It is not installed.

pytorch.py finds PyTorch, also from an isolated build; compilers.py the C++ compiler; cuda.py nvcc, and what to compile
for; libraries.py compiles and links.
"""
