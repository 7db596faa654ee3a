"""What the processes of `MathVerify` import: the comparison, and sympy with caches filled before workers are forked."""

from .math_compare import check

__all__ = ["check"]

check("1/2", r"$\frac{1}{2}$")
check("x^2-1", "(x-1)(x+1)")
