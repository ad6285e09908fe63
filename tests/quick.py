"""`jax.jit` for programs that several test files compile to run once or twice."""

from functools import partial

import jax

quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Without the compiler's optimisations, which take longer than they save here."""
