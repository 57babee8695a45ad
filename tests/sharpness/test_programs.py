"""What the measures compile: how precise it is, and how long it lives."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

from optax_vasso import sharpness

DIAGONAL = jnp.linspace(1.0, 3.0, 12)
PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(6)}
ROWS = jnp.ones((4, 1))


def loss_fn(params, batch):
    """Two quadratics without a single matrix product."""
    x = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return jnp.mean(batch) * jnp.sum(DIAGONAL * x**2) / 2


def curvature(params):
    return sharpness.hessian(loss_fn, params, ROWS)


MEASURES = {
    "hessian": lambda p: curvature(p)(p),
    "gauss_newton": lambda p: sharpness.gauss_newton(
        lambda p, batch: p, loss_fn, p, ROWS
    )(p),
    "eigenpairs": lambda p: sharpness.eigenpairs(curvature(p), p, k=2),
    "trace": lambda p: sharpness.trace(curvature(p), p),
    "spectral_density": lambda p: sharpness.spectral_density(curvature(p), p),
    "ascent_sharpness": lambda p: sharpness.ascent_sharpness(loss_fn, p, ROWS, 0.1),
    "worst_sharpness": lambda p: sharpness.worst_sharpness(loss_fn, p, ROWS, 0.1),
    "average_sharpness": lambda p: sharpness.average_sharpness(loss_fn, p, ROWS, 0.1),
    "keskar_sharpness": lambda p: sharpness.keskar_sharpness(loss_fn, p, ROWS),
    "m_sharpness": lambda p: sharpness.m_sharpness(loss_fn, p, ROWS, 0.1),
    "friendliness": lambda p: sharpness.friendliness(loss_fn, p, ROWS, p),
    "squared_error": lambda p: sharpness.squared_error(loss_fn, p, ROWS, p),
    "along": lambda p: sharpness.along(loss_fn, p, ROWS, p, [0.0, 1.0]),
    "on_plane": lambda p: sharpness.on_plane(loss_fn, p, ROWS, p, p, [0.0], [1.0]),
    "filter_normalized": lambda p: sharpness.filter_normalized(jax.random.key(0), p),
}
PRODUCTS = {"eigenpairs", "spectral_density"}


def is_program(value):
    return hasattr(value, "eqns")


def matrix_products(jaxpr):
    """The matrix products of a program and of all programs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(inner):
                yield from matrix_products(getattr(inner, "jaxpr", inner))


def test_every_measure_is_in_the_list():
    others = {"plot", "split_batches", "stack_batches"}
    assert MEASURES.keys() == set(sharpness.__all__) - others


@pytest.mark.parametrize("name", MEASURES)
def test_products_of_the_measures_are_in_full_precision(name):
    """Accelerators round the factors to 10 bits or fewer unless told otherwise.

    A Lanczos basis of such products is not orthogonal: of a matrix of rank 20 whose
    largest eigenvalue is 20 it finds 269.
    """
    program = jax.make_jaxpr(MEASURES[name])(PARAMS)
    found = list(matrix_products(program.jaxpr))
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert [e.params["precision"] for e in found] == [highest] * len(found)
    assert bool(found) == (name in PRODUCTS)


def test_products_of_the_loss_take_the_precision_that_is_asked_for():
    def linear(params, batch):
        return jnp.mean((batch @ params) ** 2)

    def program(params):
        return sharpness.trace(sharpness.hessian(linear, params, ROWS), params)

    for precision in ("highest", "high"):
        with jax.default_matmul_precision(precision):
            jaxpr = jax.make_jaxpr(program)(jnp.ones((1, 2))).jaxpr
        found = {e.params["precision"] for e in matrix_products(jaxpr)}
        assert found == {(jax.lax.Precision[precision.upper()],) * 2}


# --- lifetimes --------------------------------------------------------------------


def closure(data):
    """A loss that closes over its data, as in a notebook."""

    def loss_fn(params, batch):
        x = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
        return jnp.mean(batch) * jnp.sum(data * x**2) / 2

    return loss_fn


class Task:
    """A loss that is a method of an object with its data."""

    def __init__(self, data):
        self.data = data

    def loss(self, params, batch):
        return closure(self.data)(params, batch)

    __call__ = loss


LOSSES = {
    "closure": (closure, lambda task: task),
    "method": (Task, lambda task: task.loss),
    "object": (Task, lambda task: task),
    "functools.partial": (
        lambda data: functools.partial(lambda d, *args: closure(d)(*args), data),
        lambda task: task,
    ),
    "jax.jit": (lambda data: jax.jit(closure(data)), lambda task: task),
    "Partial": (
        lambda data: Partial(
            lambda *args, scale: scale * closure(data)(*args), scale=2
        ),
        lambda task: task,
    ),
}
ON_A_LOSS = {
    "eigenpairs": lambda loss, p: sharpness.eigenpairs(
        sharpness.hessian(loss, p, ROWS), p
    ),
    "trace": lambda loss, p: sharpness.trace(sharpness.hessian(loss, p, ROWS), p),
    "spectral_density": lambda loss, p: sharpness.spectral_density(
        sharpness.hessian(loss, p, ROWS), p, num_samples=1
    ),
    "gauss_newton": lambda loss, p: sharpness.gauss_newton(
        lambda p, batch: p, loss, p, ROWS
    )(p),
    "own product": lambda loss, p: sharpness.trace(
        lambda v: jax.grad(loss)(v, ROWS), p, num_samples=2
    ),
    "worst_sharpness": lambda loss, p: sharpness.worst_sharpness(
        loss, p, ROWS, 0.1, num_steps=1
    ),
    "average_sharpness": lambda loss, p: sharpness.average_sharpness(
        loss, p, ROWS, 0.1, num_samples=2
    ),
    "keskar_sharpness": lambda loss, p: sharpness.keskar_sharpness(
        loss, p, ROWS, num_steps=1
    ),
    "m_sharpness": lambda loss, p: sharpness.m_sharpness(loss, p, ROWS, 0.1),
    "friendliness": lambda loss, p: sharpness.friendliness(loss, p, ROWS, p),
    "squared_error": lambda loss, p: sharpness.squared_error(loss, p, ROWS, p),
    "on_plane": lambda loss, p: sharpness.on_plane(loss, p, ROWS, p, p, [0.0], [1.0]),
}


def is_freed_after(measure, make, of_task):
    """Whether a loss and its data are gone when their last name is."""
    data = DIAGONAL + 1  # An array of its own.
    task = make(data)
    references = [weakref.ref(data), weakref.ref(task)]
    if isinstance(task, Partial):  # Partials are made anew; what they hold counts.
        references[1] = weakref.ref(task.func)
    jax.block_until_ready(measure(of_task(task), PARAMS))
    del data, task
    gc.collect()
    return all(reference() is None for reference in references)


@pytest.mark.parametrize("name", ON_A_LOSS)
def test_a_measure_does_not_keep_the_loss_and_its_data_alive(name):
    assert is_freed_after(ON_A_LOSS[name], *LOSSES["closure"])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_every_kind_are_freed(name):
    assert is_freed_after(ON_A_LOSS["m_sharpness"], *LOSSES[name])
    assert is_freed_after(ON_A_LOSS["trace"], *LOSSES[name])


def test_a_curvature_keeps_the_loss_that_only_it_has():
    product = sharpness.hessian(closure(DIAGONAL), PARAMS, ROWS)
    gc.collect()
    top = sharpness.eigenpairs(product, PARAMS).values
    assert top == pytest.approx([3.0], rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_still_there_is_compiled_once(name, compilations):
    make, of_task = LOSSES[name]
    task = make(DIAGONAL)

    def measure(factor):
        params = jax.tree.map(lambda x: factor * x, PARAMS)
        for one in ("m_sharpness", "trace"):
            jax.block_until_ready(ON_A_LOSS[one](of_task(task), params))

    assert compilations(lambda: measure(1.0)) > 0
    assert compilations(lambda: measure(2.0)) == 0


def test_a_new_loss_in_the_place_of_a_freed_one_is_measured_itself():
    """Python gives the addresses of freed objects to new ones."""
    for factor in range(1, 6):
        loss = closure(factor * DIAGONAL)
        found = sharpness.eigenpairs(
            sharpness.hessian(loss, PARAMS, ROWS), PARAMS, num_matvecs=12
        )
        assert found.values == pytest.approx([3.0 * factor], rel=1e-5)
        del loss
