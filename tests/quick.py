"""Flags for XLA that compile small programs several times as fast; prints them.

What they leave out makes programs run faster, and tests run each for milliseconds. With
``--all``, or with JAX_DISABLE_MOST_OPTIMIZATIONS=0, tests run without them.
"""

import jax

# The emitters of fusions take longer than the rest of XLA and LLVM together, and to
# divide a small program among threads takes longer than to compile it. JAX 0.11 has the
# former emitters no longer, and XLA ends the process at a flag that it does not know.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

if __name__ == "__main__":
    print(*FLAGS)
