"""Builds the native code, for setup.py, and plans what run_local.sh installs. It is not installed itself.

pytorch.py finds PyTorch, also from an isolated build; compilers.py the C++ compiler; cuda.py nvcc, and what to compile
for; libraries.py compiles and links. plan.py: run_local.sh's plan.
"""
