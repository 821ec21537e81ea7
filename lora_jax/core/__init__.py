"""Pure JAX: parameters by path, the formula, adapted values, and the interpreter for them."""
