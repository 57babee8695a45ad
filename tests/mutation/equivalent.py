"""Mutants that compute the same, each with its reason: (file, old lines, new lines)."""

EQUIVALENT = {
    (
        "steps/one_gradient.py",
        "one = float(rho is None)",
        "one = 1.0",
    ): "a scale and a norm of a direction that is zero until the first step",
}
