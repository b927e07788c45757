"""What all tests share."""

import os

# Tests compile thousands of small programs and run each a few times, so that LLVM's optimisations cost more than they
# gain. Set before JAX is imported; flags of your own replace this one.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
