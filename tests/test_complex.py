"""Complex leaves count by their modulus, as in the rest of Optax.

So a method on a complex tree is the method on its real and imaginary parts.
"""

import jax
import numpy as np
import optax
import pytest
from problems import flat, random_tree, run_chain

import optax_vasso as ov

ASCENTS = {
    "sam": ov.sam_perturb(0.1),
    "vasso": optax.chain(ov.vasso_ema(0.3), ov.sam_perturb(0.1)),
    "friendly": optax.chain(ov.friendly_noise(1.0, 0.6), ov.sam_perturb(0.1)),
}


@pytest.mark.parametrize("ascent", ASCENTS.values(), ids=ASCENTS)
def test_a_complex_tree_is_its_real_and_imaginary_parts(ascent):
    gradients = [random_tree(t, ["c8"]) for t in range(3)]
    outputs, _ = run_chain(ascent, gradients)
    split, _ = run_chain(optax.contrib.split_real_and_imaginary(ascent), gradients)
    for output, expected in zip(outputs, split, strict=True):
        np.testing.assert_allclose(flat(output), flat(expected), rtol=1e-5, atol=1e-8)
        assert np.linalg.norm(flat(output)) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    "descent",
    [
        ov.descent.gsam_descent(0.3),
        ov.descent.weighted_descent(0.7),
        ov.descent.looksam_descent(0.7),
    ],
)
def test_descent_of_a_complex_tree_is_that_of_its_parts(descent):
    def parts(tree):
        return jax.tree.map(lambda z: (z.real, z.imag), tree)

    perturbed, clean = random_tree(0, ["c8"]), random_tree(1, ["c8"])
    for ascended in (True, False):
        whole, _ = descent.update(
            perturbed, descent.init(clean), clean_grads=clean, ascended=ascended
        )
        split, _ = descent.update(
            parts(perturbed),
            descent.init(parts(clean)),
            clean_grads=parts(clean),
            ascended=ascended,
        )
        np.testing.assert_allclose(
            flat(parts(whole)), flat(split), rtol=1e-4, atol=1e-6
        )


def test_the_metric_balls_use_the_modulus():
    """ASAM's T = abs(x) + η and Fisher's 1/(1 + η abs(g)²)."""
    g, x = random_tree(0, ["c8"]), random_tree(1, ["c8"])
    t = np.abs(flat(x)) + 0.01
    (asam,), _ = run_chain(ov.asam_perturb(0.5), [g], x)
    expected = 0.5 * t**2 * flat(g) / np.linalg.norm(t * flat(g))
    np.testing.assert_allclose(flat(asam), expected, rtol=1e-4, atol=1e-7)
    inverse = 1 / (1 + 2 * np.abs(flat(g)) ** 2)
    (fisher,), _ = run_chain(ov.fisher_perturb(0.5, 2.0), [g])
    expected = 0.5 * inverse * flat(g) / np.sqrt(np.sum(inverse * np.abs(flat(g)) ** 2))
    np.testing.assert_allclose(flat(fisher), expected, rtol=1e-4, atol=1e-7)
