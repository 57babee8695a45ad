"""Flags for XLA that compile small programs several times as fast; prints them.

What they leave out makes programs run faster, and tests run each for milliseconds. With
``--all``, or with JAX_DISABLE_MOST_OPTIMIZATIONS=0, tests run without them.
"""

import functools

import jax
from jax._src.interpreters import mlir

# The emitters of fusions take longer than the rest of XLA and LLVM together, and to
# divide a small program among threads takes longer than to compile it. JAX 0.11 has the
# former emitters no longer, and XLA ends the process at a flag that it does not know.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def share_context():
    """Lower every program of this process in one context of MLIR.

    JAX makes one for each, and to load its dialects takes a quarter of the time that a
    small program takes from Python to machine code. Not public: left as it is where a
    version of JAX has no such function.
    """
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


if __name__ == "__main__":
    print(*FLAGS)
