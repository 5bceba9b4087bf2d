"""The machine code of CUDA kernels (SASS), run on the CPU: which instructions every warp issues, and what they compute.

    kernels(library, "sm_80")["attention_kernel<TensorCores, bfloat16, 128>"]     as cuobjdump prints them (code.py)
    run_block(kernel, launch, number, Memory(tensors))                            runs one block to its end (block.py)

A block's threads run in lockstep as long as they are at the same instruction, as rows of numpy arrays: registers are
[number, thread]. Every instruction (instructions.py) works on real data, so branches go where they go on a GPU; one
that is not known here is an error. Warps that diverge come together where the code says so (BSSY, BSYNC), as on a GPU
from Volta on. What MUFU approximates is computed in float32.
"""

from benchmarks.sass.block import WARP, Block, Issue, Launch, Memory, run_block
from benchmarks.sass.code import Instruction, Kernel, Operand, SassError, cuobjdump, disassembler, kernels, short

__all__ = [
    "WARP",
    "Block",
    "Instruction",
    "Issue",
    "Kernel",
    "Launch",
    "Memory",
    "Operand",
    "SassError",
    "cuobjdump",
    "disassembler",
    "kernels",
    "run_block",
    "short",
]
