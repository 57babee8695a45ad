"""Libraries that run the loop and hand out the state of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import plain_loop
import pytest

import optax_vasso as ov

pytestmark = pytest.mark.usefixtures("foreign")
STEPS = 4
BASE = optax.sgd(plain_loop.RATE)
LAGGED = ov.lagged_vasso(BASE, plain_loop.RHO, theta=plain_loop.THETA)
VASSO = ov.vasso(BASE, plain_loop.RHO, theta=plain_loop.THETA)
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.standard_normal((8, 3)), jnp.float32)
TARGETS = jnp.asarray(RNG.standard_normal(8), jnp.float32)
START = {"kernel": jnp.array([0.5, -1.0, 0.25]), "bias": jnp.float32(0.1)}


def loss(params, inputs):
    return jnp.mean((inputs @ params["kernel"] + params["bias"] - TARGETS) ** 2)


def gradient(params, step):
    return jax.grad(loss)(params, INPUTS)


def test_optimistix_with_one_gradient():
    optx = pages.require("optimistix")
    solver = optx.OptaxMinimiser(LAGGED, 1e-9, 1e-9)
    solution = optx.minimise(
        loss, solver, START, args=INPUTS, max_steps=STEPS, throw=False
    )
    x, y = plain_loop.lagged(gradient, START, STEPS)
    plain_loop.assert_close(solution.value, y)
    plain_loop.assert_close(ov.eval_params(solution.state, solution.value), x)


def test_optimistix_with_two_gradients_untouched():
    optx = pages.require("optimistix")
    solver = optx.OptaxMinimiser(VASSO, 1e-9, 1e-9)
    solution = optx.minimise(
        loss, solver, START, args=INPUTS, max_steps=STEPS, throw=False
    )
    plain_loop.assert_close(solution.value, plain_loop.vasso(gradient, START, STEPS))


def test_numpyro_constrains_the_clean_point():
    numpyro = pages.require("numpyro")
    page = pages.names_of("docs/trainers/keep-the-state.md")
    data = jnp.array([1.0, 2.0, 4.0])
    rate = 1e-2

    def negative_log_likelihood(params, step):
        def value(params):
            scale = jnp.exp(params["scale"])
            return jnp.sum(
                (data - params["location"]) ** 2 / (2 * scale**2) + params["scale"]
            )

        return jax.grad(value)(params)

    svi = numpyro.infer.SVI(
        page["model"],
        page["guide"],
        ov.lagged_vasso(optax.sgd(rate), plain_loop.RHO, theta=plain_loop.THETA),
        numpyro.infer.Trace_ELBO(),
    )
    state = svi.init(jax.random.key(0), data)
    for _ in range(STEPS):
        state, _ = svi.update(state, data)
    x, _ = plain_loop.lagged(
        negative_log_likelihood,
        {"location": jnp.zeros(()), "scale": jnp.zeros(())},
        STEPS,
        rate=rate,
    )
    params = page["clean_params"](svi, state)
    plain_loop.assert_close(
        params, {"location": x["location"], "scale": jnp.exp(x["scale"])}
    )


@pytest.mark.parametrize("library", ["numpyro", "penzai", "netket", "jaxopt"])
def test_a_loop_without_the_loss_says_what_two_gradients_need(library):
    pages.require(library)
    page = pages.names_of("docs/trainers/keep-the-state.md")

    def train():
        if library == "numpyro":
            svi = page["SVI"](page["model"], page["guide"], VASSO, page["Trace_ELBO"]())
            svi.update(svi.init(jax.random.key(0), page["data"]), page["data"])
        elif library == "penzai":
            page["basic_training"].StatefulTrainer.build(
                root_rng=jax.random.key(1),
                model=page["layer"],
                optimizer_def=VASSO,
                loss_fn=page["penzai_loss"],
            ).step()
        elif library == "netket":
            page["nk"].driver.VMC(
                page["hamiltonian"], VASSO, variational_state=page["state"]
            ).run(1, show_progress=False)
        else:
            page["jaxopt"].OptaxSolver(loss, opt=VASSO).run(START, INPUTS)

    with pytest.raises(ValueError, match="needs grad_fn, got None.*or use lagged"):
        train()


def test_penzai():
    pages.require("penzai")
    page = pages.names_of("docs/trainers/keep-the-state.md")
    pz, layer = page["pz"], page["layer"]
    stateless, params = pz.unbind_params(layer)
    start = pz.freeze_params(params)

    def penzai_gradient(params, step):
        def value(params):
            model = pz.bind_variables(stateless, params)
            residual = (model(page["x"]) - 1.0).unwrap("batch", "out")
            return jnp.mean(residual**2)

        return jax.grad(value)(params)

    def penzai_loss(model, state, rng):
        residual = (model(page["x"]) - 1.0).unwrap("batch", "out")
        return jnp.mean(residual**2), state, {}

    trainer = page["basic_training"].StatefulTrainer.build(
        root_rng=jax.random.key(1),
        model=layer,
        optimizer_def=LAGGED,
        loss_fn=penzai_loss,
    )
    x, y = plain_loop.lagged(penzai_gradient, start, STEPS)
    for _ in range(STEPS):
        trainer.step()
    _, params = pz.unbind_params(trainer.model)
    perturbed = pz.freeze_params(params)
    plain_loop.assert_close(perturbed, y)
    clean = ov.eval_params(trainer.state.value.opt_state, perturbed)
    plain_loop.assert_close(clean, x)


def test_netket_with_complex_parameters():
    nk = pages.require("netket")
    hilbert = nk.hilbert.Spin(0.5, N=4)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(4), h=1.0)
    model = nk.models.RBM(alpha=1, param_dtype=complex)
    state, other = (nk.vqs.FullSumState(hilbert, model, seed=0) for _ in range(2))

    def energy_gradient(params, step):
        other.parameters = params
        return other.expect_and_grad(hamiltonian)[1]

    assert jnp.iscomplexobj(jax.tree.leaves(state.parameters)[0])
    x, y = plain_loop.lagged(energy_gradient, state.parameters, STEPS)
    driver = nk.driver.VMC(hamiltonian, LAGGED, variational_state=state)
    driver.run(STEPS, show_progress=False)
    plain_loop.assert_close(state.parameters, y, rtol=1e-6)
    clean = ov.eval_params(driver._optimizer_state, state.parameters)
    plain_loop.assert_close(clean, x, rtol=1e-6)


def test_jaxopt_with_one_gradient_and_with_a_bound_loss():
    jaxopt = pages.require("jaxopt")
    x, y = plain_loop.lagged(gradient, START, STEPS)
    result = jaxopt.OptaxSolver(loss, opt=LAGGED, maxiter=STEPS, tol=0.0).run(
        START, INPUTS
    )
    plain_loop.assert_close(result.params, y)
    plain_loop.assert_close(ov.eval_params(result.state, result.params), x)
    bound = optax.GradientTransformation(
        VASSO.init,
        lambda grads, state, params: VASSO.update(
            grads, state, params, grad_fn=lambda x: jax.grad(loss)(x, INPUTS)
        ),
    )
    result = jaxopt.OptaxSolver(loss, opt=bound, maxiter=STEPS, tol=0.0).run(
        START, INPUTS
    )
    plain_loop.assert_close(result.params, plain_loop.vasso(gradient, START, STEPS))
