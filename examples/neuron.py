"""What a normalization asks of a neuron: whom it must hear, what it must remember, how much it must compute.

Each normalization is written here as a neuron would have to carry it out, number by number; the numbers count the
operations made with them. The tests check these neurons against the layers of torch.nn and streamnorm, so what is
counted is what the layers compute. Gain and bias are left out: they are the same for all.

    python examples/neuron.py
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

OPERATIONS = ("add", "multiply", "divide", "root", "sign")
EPS = 1e-5


class Number:
    """A float that counts what is done with it; taking a sign or an absolute value is called "sign"."""

    done: ClassVar[Counter[str]] = Counter()

    def __init__(self, value: float) -> None:
        self.value = value

    def __add__(self, other: Number | float) -> Number:
        return self._count("add", self.value + float(other))

    def __sub__(self, other: Number | float) -> Number:
        return self._count("add", self.value - float(other))

    def __mul__(self, other: Number | float) -> Number:
        return self._count("multiply", self.value * float(other))

    def __truediv__(self, other: Number | float) -> Number:
        return self._count("divide", self.value / float(other))

    def __abs__(self) -> Number:
        return self._count("sign", abs(self.value))

    def root(self) -> Number:
        return self._count("root", self.value**0.5)

    def with_sign_of(self, other: Number) -> Number:
        """This number times the sign of another, for which nothing need be multiplied."""
        sign = (other.value > 0) - (other.value < 0)
        return self._count("sign", sign * self.value)

    def __float__(self) -> float:
        return self.value

    def _count(self, operation: str, value: float) -> Number:
        Number.done[operation] += 1
        return Number(value)


def mean(values: Sequence[Number]) -> Number:
    """Their mean, with one division."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total / len(values)


class Together:
    """Batch, Layer, Group and Instance Normalization: a set of activations waits until all of them are there.

    The set is one neuron's activations in a mini-batch, or one sample's activations in several neurons; the
    computation is the same.
    """

    def forward(self, xs: Sequence[Number]) -> list[Number]:
        mu = mean(xs)
        deviations = [x - mu for x in xs]
        s = (mean([d * d for d in deviations]) + EPS).root()
        self.scale = Number(1.0) / s
        self.normalized = [d * self.scale for d in deviations]
        return self.normalized

    def backward(self, grads: Sequence[Number]) -> list[Number]:
        mean_grad = mean(grads)
        slope = mean([grad * x for grad, x in zip(grads, self.normalized)])
        return [(grad - mean_grad - x * slope) * self.scale for grad, x in zip(grads, self.normalized)]

    def kept_to_backward(self) -> float:
        """Numbers per activation that wait for the gradient."""
        return (len(self.normalized) + 1) / len(self.normalized)


@dataclass
class Average:
    """One streamed quantity: its long-term average, and the short-term one since the last weight update."""

    long: Number
    short: Number
    count: int = 0

    def take(self, value: Number) -> None:
        self.count += 1
        self.short = self.short + (value - self.short) / self.count

    def mix(self, weights: tuple[float, float]) -> Number:
        return self.long * weights[0] + self.short * weights[1]

    def commit(self, kappa: float) -> None:
        if self.count:
            self.long = self.long * kappa + self.short * (1 - kappa)
        self.short, self.count = Number(0.0), 0


class Streaming:
    """Streaming Normalization with the paper's constants, one sample at a time, p = 1 or p = 2."""

    alpha = beta = (0.7, 0.3)
    kappa = 0.7

    def __init__(self, p: int) -> None:
        self.p = p
        self.mu, self.m = Average(Number(0.0), Number(0.0)), Average(Number(1.0), Number(0.0))
        self.grad_mu, self.grad_m = Average(Number(0.0), Number(0.0)), Average(Number(0.0), Number(0.0))

    def forward(self, x: Number) -> Number:
        self.mu.take(x)
        self.d = x - self.mu.mix(self.alpha)
        self.m.take(abs(self.d) if self.p == 1 else self.d * self.d)
        m = self.m.mix(self.alpha)
        squared = (m * m if self.p == 1 else m) + EPS
        self.scale = Number(1.0) / squared.root()
        self.slope = m / squared if self.p == 1 else Number(1.0) / squared  # of log s in m, times p
        return self.d * self.scale

    def backward(self, grad: Number) -> Number:
        direct = grad * self.scale
        self.grad_m.take(direct * self.d * self.slope)  # -g_m times p
        hat_m = self.grad_m.mix(self.beta)
        through_m = hat_m.with_sign_of(self.d) if self.p == 1 else hat_m * self.d
        self.grad_mu.take(through_m - direct)
        return direct + self.grad_mu.mix(self.beta) - through_m

    def update(self) -> None:
        """The weights changed."""
        for average in self.remembered():
            average.commit(self.kappa)

    def remembered(self) -> list[Average]:
        return [self.mu, self.m, self.grad_mu, self.grad_m]

    def kept_to_backward(self) -> int:
        """Numbers that wait for the gradient: the deviation, 1/s and the slope."""
        return 3


@dataclass
class Needs:
    """What one activation costs one neuron, forward and backward."""

    name: str
    hears: str
    waits: str
    remembers: str
    keeps: float
    operations: Counter[str]
    activations: int

    def row(self) -> str:
        numbers = [f"{self.operations[name] / self.activations:.3g}" for name in OPERATIONS]
        return f"| {' | '.join([self.name, self.hears, self.waits, self.remembers, f'{self.keeps:.3g}', *numbers])} |"


def together(name: str, hears: str, waits: str, remembers: str, size: int) -> Needs:
    """Count for a set of so many activations."""
    Number.done.clear()
    layer = Together()
    layer.forward(_random(size))
    layer.backward(_random(size))
    return Needs(name, hears, waits, remembers, layer.kept_to_backward(), Number.done.copy(), size)


def streaming(p: int) -> Needs:
    """Count for one sample, and an update of the weights after it."""
    neuron = Streaming(p)
    Number.done.clear()
    (x, grad) = _random(2)
    neuron.forward(x)
    neuron.backward(grad)
    neuron.update()
    # One number more is the count: samples and gradients arrive in pairs here.
    remembers = str(2 * len(neuron.remembered()) + 1)
    return Needs(f"Streaming L{p}", "nobody", "no", remembers, neuron.kept_to_backward(), Number.done.copy(), 1)


def _random(count: int) -> list[Number]:
    generator = random.Random(0)
    return [Number(generator.gauss(0, 1)) for _ in range(count)]


def main() -> str:
    """The table, in Markdown."""
    needs = [
        together("Batch, 32 samples", "itself, at 31 other samples", "for the mini-batch", "2", 32),
        together("Layer, 256 neurons", "255 other neurons", "for the layer", "0", 256),
        together("Group, 8 neurons", "7 other neurons", "for the group", "0", 8),
        streaming(2),
        streaming(1),
    ]
    head = ["normalization", "hears", "waits", "remembers", "keeps", *OPERATIONS]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(need.row() for need in needs)])


if __name__ == "__main__":
    print(main())
