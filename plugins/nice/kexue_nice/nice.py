"""NICE: data to independent components by a flow of additive couplings, and back.

Symbols: x data, h(k) after coupling k, z = s h(n) latent, m the perceptron of a coupling, D numbers
per row.

    log q(x) = log q(z) + sum_i log s_i        (eq. 15 of the post; paper, sections 3.2 and 3.3)

Couplings have determinant 1 and permutations ±1, so only the scale counts. A pass takes one gather
and the perceptrons, in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kexue.core import ArgumentError, Example, Generator
from kexue_nice import checks
from kexue_nice.dequantisation import add_noise, bits_per_dim, cell, to_levels
from kexue_nice.layers import AdditiveCoupling, DiagonalScale, perceptron
from kexue_nice.priors import PRIORS

__all__ = ["NICE"]

_LOOKED_AT = 4096  # rows that the initialisation sees


class NICE(Generator):
    """A flow of additive couplings and a diagonal scale, fitted by maximum likelihood.

    Densities are of rows in the scale of the data. Images hold grey levels, k / (levels - 1):
    ``levels`` makes them continuous by uniform noise when fitting, gives bits per dimension in
    :meth:`evaluate`, and rounds what :meth:`generate` draws. :meth:`log_prob`, :meth:`encode` and
    :meth:`decode` take rows as they are.

    ``fit`` begins with the centre of the data and with scales that give z the deviations of the
    prior.

    Args:
        num_features: D, numbers per row, at least 2.
        shape: Of a row; ``[num_features]`` by default.
        num_couplings: How many additive couplings; from 3 on, every feature can act on all others.
        hidden: Widths of the hidden ReLU layers of each m. The post and the paper take five of 1000
            for 784 pixels.
        split: ``"interleave"`` puts features with even numbers into the first part, ``"half"`` the
            first half.
        mixing: What happens between couplings: ``"swap"`` swaps the two parts, ``"shuffle"``
            permutes all features at random, ``"none"`` leaves the first part as it is for good.
        relu_output: Whether m ends in a ReLU and is subtracted by the encoder, so that generating
            only adds: the post's choice for pixels, which are positive.
        prior: ``"gaussian"`` or ``"logistic"``.
        levels: Number of grey levels, 256 for images of 8 bits; None for continuous data.
        noise: Range of the uniform noise in place of the one that ``levels`` gives. The post's is
            [-0.01, 0]. Bits per dimension are not known then.
        temperature: Factor of the standard deviation of z when generating.

    Raises:
        ArgumentError: If an argument is out of range.

    References:
        Su, https://kexue.fm/archives/5776; Dinh, Krueger and Bengio,
        https://arxiv.org/abs/1410.8516.

    Example:
        >>> import torch
        >>> from kexue_nice import NICE
        >>> model = NICE(6, num_couplings=4, hidden=[16])
        >>> x = torch.randn(3, 6)
        >>> torch.allclose(model.decode(model.encode(x)), x, atol=1e-5)
        True
        >>> model.log_prob(x).shape, model.generate(5).shape
        (torch.Size([3]), torch.Size([5, 6]))
    """

    differentiable: ClassVar[bool] = True

    center: Tensor
    orders: Tensor
    initialised: Tensor

    def __init__(
        self,
        num_features: int,
        shape: Sequence[int] | None = None,
        *,
        num_couplings: int = 4,
        hidden: Sequence[int] = (256, 256),
        split: Literal["interleave", "half"] = "interleave",
        mixing: Literal["swap", "shuffle", "none"] = "swap",
        relu_output: bool = False,
        prior: Literal["gaussian", "logistic"] = "gaussian",
        levels: int | None = None,
        noise: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape = [num_features] if shape is None else [*shape]
        checks.check_sizes(num_features, self.shape, num_couplings, hidden, levels)
        checks.check_choice("split", split, ("interleave", "half"))
        checks.check_choice("mixing", mixing, ("swap", "shuffle", "none"))
        checks.check_choice("prior", prior, tuple(PRIORS))
        checks.check_noise(noise)
        checks.check_temperature(temperature)
        self.num_features, self.num_couplings, self.hidden = num_features, num_couplings, [*hidden]
        self.split, self.mixing, self.relu_output = split, mixing, relu_output
        self.prior, self.levels, self.temperature = prior, levels, temperature
        self.noise = None if noise is None else [float(end) for end in noise]
        self.sizes = [-(-num_features // 2), num_features // 2]  # of the two parts
        self.couplings = nn.ModuleList(self._coupling(k) for k in range(num_couplings))
        self.scale = DiagonalScale(num_features)
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("orders", self._orders())  # before the couplings, [order, feature]
        self.register_buffer("initialised", torch.tensor(False))  # by the data

    def _coupling(self, k: int) -> AdditiveCoupling:
        kept, changed = reversed(self.sizes) if self._swapped(k) else self.sizes
        shift = perceptron([kept, *self.hidden, changed], relu_output=self.relu_output)
        return AdditiveCoupling(shift, sign=-1 if self.relu_output else 1)

    def _swapped(self, k: int) -> bool:
        """Whether coupling k keeps the second part."""
        return self.mixing == "swap" and k % 2 == 1

    def _orders(self) -> Tensor:
        """Return one permutation, or one for each coupling; the first ones make the first part."""
        features = torch.arange(self.num_features)
        if self.split == "interleave":
            features = torch.cat([features[0::2], features[1::2]])
        if self.mixing != "shuffle":
            return features[None]
        further = (torch.randperm(self.num_features) for _ in range(self.num_couplings - 1))
        return torch.stack([features, *further])

    # -- the flow ---------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch feature"]:
        """Return z = s f(x).

        Args:
            x: Rows, in their shape or flat.
        """
        checks.check_rows("x", x, self.shape)
        z: Tensor = self.scale(self._couple(x.flatten(1)))
        return z

    def decode(self, z: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch ..."]:
        """Return x with ``encode(x)`` = z.

        Args:
            z: Latent rows.
        """
        checks.check_rows("z", z, [self.num_features])
        return self._uncouple(self.scale.inverse(z)).reshape(len(z), *self.shape)

    def log_prob(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """Return the log-density of each row in nats; computed in float32 of half precision.

        Args:
            x: Rows, in their shape or flat. Grey levels are not made noisy here; a density at them
                says little.
        """
        z = self.encode(x)
        exact = z if z.dtype == torch.float64 else z.float()
        return PRIORS[self.prior].log_prob(exact) + self.scale.log_det

    def _couple(self, x: Tensor) -> Tensor:
        """Return h(n), flat; its parts one after the other."""
        h = (x - self.center).index_select(1, self.orders[0])
        first, second = torch.split(h, self.sizes, 1)
        for k, coupling in enumerate(self.couplings):
            if k and self.mixing == "shuffle":
                h = torch.cat([first, second], 1).index_select(1, self.orders[k])
                first, second = torch.split(h, self.sizes, 1)
            if self._swapped(k):
                first = coupling(second, first)
            else:
                second = coupling(first, second)
        return torch.cat([first, second], 1)

    def _uncouple(self, h: Tensor) -> Tensor:
        """Return x, flat."""
        first, second = torch.split(h, self.sizes, 1)
        for k in reversed(range(self.num_couplings)):
            coupling: Any = self.couplings[k]
            if self._swapped(k):
                first = coupling.inverse(second, first)
            else:
                second = coupling.inverse(first, second)
            if k and self.mixing == "shuffle":
                h = torch.cat([first, second], 1).index_select(1, self.orders[k].argsort())
                first, second = torch.split(h, self.sizes, 1)
        h = torch.cat([first, second], 1)
        return h.index_select(1, self.orders[0].argsort()) + self.center

    # -- data -------------------------------------------------------------------------------------

    def dequantize(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return rows with the noise that they are fitted with; as they are if there is none.

        Args:
            x: Rows.
            generator: Source of randomness; the global one by default.
        """
        if self.noise is not None:
            return add_noise(x, (self.noise[0], self.noise[1]), generator)
        return x if self.levels is None else add_noise(x, cell(self.levels), generator)

    def bits_per_dim(
        self, x: Float[Tensor, "batch ..."], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " batch"]:
        """Return an upper bound of the bits per dimension of each row of grey levels.

        Args:
            x: Rows of values k / (levels - 1).
            generator: Source of the noise; the global one by default.

        Raises:
            ArgumentError: If the model has no ``levels``, or a ``noise`` of its own.
        """
        if self.levels is None or self.noise is not None:
            raise ArgumentError(
                "`levels` of NICE must be set, and `noise` must not, to know bits per dimension. "
                f"Found levels={self.levels}, noise={self.noise}.",
                argument="levels",
            )
        nats = -self.log_prob(self.dequantize(x, generator=generator))
        return bits_per_dim(nats, self.num_features, self.levels)

    def interpolate(
        self,
        start: Float[Tensor, "batch ..."],
        end: Float[Tensor, "batch ..."],
        steps: int = 8,
    ) -> Float[Tensor, "step batch ..."]:
        """Return rows whose latent ones lie on the line from one row's to another's.

        Args:
            start: Rows.
            end: As many rows.
            steps: How many, the ends included.
        """
        if start.shape != end.shape or steps < 2:
            raise ArgumentError(
                f"`end` must have the shape of `start`, {list(start.shape)}, and `steps` be at "
                f"least 2. Found {list(end.shape)} and {steps}.",
                argument="end" if steps >= 2 else "steps",
            )
        weights = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)
        z = torch.lerp(self.encode(start), self.encode(end), weights[:, None, None])
        return self.decode(z.flatten(0, 1)).reshape(steps, len(start), *self.shape)

    # -- the contract of generators ---------------------------------------------------------------

    def generate(
        self,
        num_samples: int,
        *,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw new rows, shape ``[num_samples, *shape]``.

        Args:
            num_samples: How many.
            temperature: Factor of the standard deviation of z; the constructor's by default. The
                post finds 0.75 best for its images.
            generator: Source of randomness; the global one by default.

        Raises:
            ArgumentError: If an argument is negative.
        """
        factor = self.temperature if temperature is None else temperature
        checks.check_temperature(factor)
        if num_samples < 0:
            raise ArgumentError(
                f"`num_samples` of NICE must be at least 0. Found {num_samples}.",
                argument="num_samples",
            )
        center = self.center
        wide = torch.promote_types(center.dtype, torch.float32)
        like = torch.empty(num_samples, self.num_features, dtype=wide, device=center.device)
        z = factor * PRIORS[self.prior].sample(like, generator)
        with torch.no_grad():
            x = self.decode(z.to(center.dtype))
        return x if self.levels is None else to_levels(x, self.levels)

    def loss(self, batch: Tensor) -> Tensor:
        """Return the mean negative log-density of noisy rows in nats."""
        return -self.log_prob(self.dequantize(batch)).mean()

    def evaluate(
        self, examples: Sequence[Any] | Tensor, *, batch_size: int = 64
    ) -> dict[str, float]:
        """Measure the loss, and bits per dimension where they are known."""
        figures = super().evaluate(examples, batch_size=batch_size)
        if self.levels is not None and self.noise is None:
            nats = torch.tensor(figures["loss"])
            figures["bits_per_dim"] = float(bits_per_dim(nats, self.num_features, self.levels))
        return figures

    @torch.no_grad()
    def prepare(self, examples: Sequence[Any] | Tensor) -> None:
        """Set centre and scales by the data, the first time that the model is fitted.

        Args:
            examples: Rows.

        Raises:
            ArgumentError: If they are not of the model's shape, not finite, or no grey levels.
        """
        if self.initialised:
            return
        chosen = torch.linspace(0, len(examples) - 1, min(len(examples), _LOOKED_AT)).long()
        rows = self.collate([examples[i] for i in chosen.tolist()])
        checks.check_rows("examples", rows, self.shape)
        x = rows.flatten(1).to(self.center)
        noisy = self.levels is not None or self.noise is not None
        checks.check_data(x, self.levels, noisy=noisy)
        x = self.dequantize(x)
        self.center.copy_(x.mean(0))
        self.scale.match(self._couple(x), PRIORS[self.prior].std)
        self.initialised.fill_(True)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = (
            "num_features shape num_couplings hidden split mixing relu_output prior levels noise "
            "temperature"
        )
        return {name: getattr(self, name) for name in names.split()}

    @classmethod
    def example(cls, *, generator: torch.Generator | None = None) -> Example:
        """Return forty rows of three features to fit to."""
        data = 2 + 0.5 * torch.randn(40, 3, generator=generator)
        return Example({"num_features": 3, "hidden": [16]}, {"data": data, "num_samples": 5})
