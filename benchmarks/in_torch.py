"""The other side of :mod:`benchmarks.peers`: networks and optimizers in PyTorch.

The optimizers are the plain idiom of the published repositories: SAM in the form of
davda54/sam (first step, second step, one parameter after the other), VaSSO as that
with an average of the gradient in its place.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Closure = Callable[[], torch.Tensor]


def perceptron(params: Any) -> nn.Module:
    """From the parameters of :func:`benchmarks.networks.perceptron`."""
    layers: list[nn.Module] = []
    for layer in params:
        layers += [dense(layer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """A pre-norm block of the byte-level transformer."""

    def __init__(self, attention: Any, norms: list[Any], up: Any, down: Any) -> None:
        super().__init__()
        self.heads = np.shape(attention["query"]["kernel"])[1]
        flat = {
            part: {
                "kernel": np.reshape(
                    layer["kernel"],
                    (-1, np.shape(layer["kernel"])[-1])
                    if part == "out"
                    else (np.shape(layer["kernel"])[0], -1),
                ),
                "bias": np.reshape(layer["bias"], -1),
            }
            for part, layer in attention.items()
        }
        self.query, self.key, self.value, self.out = (
            dense(flat[part]) for part in ("query", "key", "value", "out")
        )
        self.before_attention, self.before_mlp = map(layer_norm, norms)
        self.up, self.down = dense(up), dense(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> the same."""
        y = self.before_attention(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(self.before_mlp(x)), approximate="tanh")
        return x + self.down(hidden)


class Transformer(nn.Module):
    """From the parameters of :mod:`benchmarks.transformer`."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(
            tensor(params["Embed_0"]["embedding"]), freeze=False
        )
        blocks = sum(name.startswith("MultiHead") for name in params)
        self.blocks = nn.Sequential(
            *(
                Block(
                    params[f"MultiHeadDotProductAttention_{i}"],
                    [params[f"LayerNorm_{2 * i}"], params[f"LayerNorm_{2 * i + 1}"]],
                    params[f"Dense_{2 * i}"],
                    params[f"Dense_{2 * i + 1}"],
                )
                for i in range(blocks)
            )
        )
        self.norm = layer_norm(params[f"LayerNorm_{2 * blocks}"])
        self.head = dense(params[f"Dense_{2 * blocks}"])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) -> logits (batch, length, 256)."""
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def tensor(array: Any) -> torch.Tensor:
    """A copy of an array."""
    return torch.from_numpy(np.array(array))


def dense(layer: Mapping[str, Any]) -> nn.Linear:
    """A linear layer with the weights of Flax's."""
    kernel, bias = tensor(layer["kernel"]), tensor(layer["bias"])
    made = nn.Linear(*kernel.shape)
    made.weight.data, made.bias.data = kernel.T.contiguous(), bias
    return made


def layer_norm(layer: Mapping[str, Any]) -> nn.LayerNorm:
    """A layer normalization with the weights of Flax's."""
    made = nn.LayerNorm(len(layer["scale"]), eps=1e-6)
    made.weight.data, made.bias.data = tensor(layer["scale"]), tensor(layer["bias"])
    return made


def network(params: Any) -> nn.Module:
    """The module for the parameters of a network of :mod:`benchmarks.networks`."""
    return perceptron(params) if isinstance(params, list) else Transformer(params)


def loss_of(model: Callable[..., Any], batch: Any, device: str = "cpu") -> Closure:
    """() -> the mean cross-entropy on a batch, its gradient taken."""
    if isinstance(batch, tuple):
        inputs, labels = map(tensor, batch)
    else:
        inputs, labels = tensor(batch[:, :-1]).long(), tensor(batch[:, 1:])
    inputs, labels = inputs.to(device), labels.long().to(device)

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
        loss.backward()
        return loss

    return closure


class SAM(torch.optim.Optimizer):
    """SAM in the form of davda54/sam; with ``theta``, VaSSO in the same form."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        rho: float,
        theta: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, **base})
        self.base = torch.optim.SGD(self.param_groups, **base)
        self.param_groups, self.theta = self.base.param_groups, theta

    def direction(self, p: torch.Tensor) -> torch.Tensor:
        """What the perturbation follows."""
        if self.theta is None:
            return p.grad
        state = self.state[p]
        if "average" not in state:
            state["average"] = p.grad.clone()
        else:
            state["average"].mul_(1 - self.theta).add_(p.grad, alpha=self.theta)
        return state["average"]

    @torch.no_grad()
    def step(self, closure: Closure) -> None:
        """A step; the gradient at the parameters has been taken."""
        group = self.param_groups[0]
        directions = [self.direction(p) for p in group["params"]]
        norm = torch.stack([d.norm(p=2) for d in directions]).norm(p=2)
        for p, d in zip(group["params"], directions, strict=True):
            self.state[p]["old"] = p.data.clone()
            p.add_(d * (group["rho"] / (norm + 1e-12)))
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p in group["params"]:
            p.data = self.state[p]["old"]
        self.base.step()
        self.zero_grad()


def optimizers(rho: float, theta: float, lmbda: float, base: dict[str, float]) -> Any:
    """Name -> what makes an optimizer of a module's parameters."""
    from pytorch_optimizer import SAM as PackagedSAM, FriendlySAM

    sgd = torch.optim.SGD
    return {
        "SGD: PyTorch": lambda params: sgd(params, **base),
        "SAM: PyTorch, davda54's form": lambda params: SAM(params, rho, **base),
        "SAM: pytorch_optimizer": lambda params: PackagedSAM(
            params, sgd, rho=rho, **base
        ),
        "VaSSO: PyTorch, the papers' form": lambda params: SAM(
            params, rho, theta, **base
        ),
        "Friendly SAM: pytorch_optimizer": lambda params: FriendlySAM(
            params, sgd, rho=rho, sigma=1.0, lmbda=lmbda, **base
        ),
    }


class Running:
    """A module in training: each call takes one step, eager or compiled."""

    def __init__(
        self,
        params: Any,
        batch: Any,
        make: Callable[..., Any],
        compiled: bool = False,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = network(params).to(device)
        self.optimizer = make(list(model.parameters()))
        called = torch.compile(model) if compiled else model
        self.closure = loss_of(called, batch, device)

    def __call__(self) -> None:
        """Take a step, and wait for it."""
        self.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def step(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self.closure()
        if isinstance(self.optimizer, torch.optim.SGD):
            self.optimizer.step()
        elif isinstance(self.optimizer, SAM):
            self.optimizer.step(self.closure)
        else:  # pytorch_optimizer's closures clear the gradient themselves

            def closure() -> torch.Tensor:
                self.optimizer.zero_grad()
                return self.closure()

            self.optimizer.step(closure)

    def loss(self) -> float:
        """At the parameters that it has reached."""
        self.optimizer.zero_grad()
        return self.closure().item()
