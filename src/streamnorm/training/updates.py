"""Noticing weight updates: layers commit their statistics after ``optimizer.step()``, and no loop changes for it."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..ops import graph
from . import agreement, checkpoint, runaway, watchdog
from .streaming import Streaming, streaming_modules
from .surroundings import (
    calling_modules,
    leaves_of,
    optimizers_in,
    owns_any,
    parameters_of,
    set_surroundings,
    weight_before,
)
from .ties import Binding, Parameters, Ties, alive

Listener = Callable[[Sequence[Streaming], Optimizer | None], None]

_layers: dict[int, weakref.ref[Streaming]] = {}
"""The streaming layers that may hold statistics to commit, in the order in which they became known."""

_hooks: list[RemovableHandle] = []

_lease_of_graphs: Iterator[bool] = watchdog.lease(watchdog.USES)
"""As a layer's, for all that run in compiled graphs."""

_listeners: OrderedDict[int, Listener] = OrderedDict()
"""Called at weight updates; :func:`before_commit` adds to them."""

_aside: weakref.WeakKeyDictionary[Optimizer, nn.Module] = weakref.WeakKeyDictionary()
"""Optimizers whose steps are updates of one model and of nothing else; :func:`set_aside` adds to them."""


def register(layer: Streaming) -> None:
    """Let a layer commit at the steps of the optimizer that trains its network."""
    if not _hooks:
        _hooks.extend((register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_all)))
    key = id(layer)
    _layers[key] = weakref.ref(layer, lambda _: _layers.pop(key, None))


def enroll(model: nn.Module) -> None:
    """Let the streaming layers of a model commit in the order in which they stand in it, and know them by name."""
    layers = streaming_modules(model)
    for layer in layers:
        _layers.pop(id(layer), None)
        register(layer)
        layer._ties.met = layer._ties.used = True
        layer._ties.name = ""
    set_surroundings(model, layers)


def notice(layer: Streaming, x: Tensor | None = None) -> None:
    """A layer is used: for the first time, by another DistributedDataParallel, or when it is due for a look."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None:
        adopt(ddp)
        layer._ties.ddp = weakref.ref(ddp)  # also where the model does not register it
    if not layer._ties.met or layer._ties.outdated:
        meet(layer, x)
        layer._ties.lease = watchdog.lease(watchdog.USES)
    elif next(layer._ties.lease, None) is None:
        layer._ties.lease = watchdog.lease(watchdog.look(layer))


def meet(layer: Streaming, x: Tensor | None = None) -> None:
    """Find out what a layer stands in, and let it commit."""
    register(layer)
    ties = layer._ties
    ties.used, ties.outdated, layer._ties.met = True, False, True
    ties.leaves = leaves_of(layer)
    ties.before = None if x is None else weight_before(x)
    calling = calling_modules()
    *_, outermost = None, *alive(ties.around)
    if calling and calling[0] is not outermost and layer._ties.ddp is None:  # DDP names the same in all processes
        for module in calling:
            if any(inside is layer for inside in module.modules()):
                set_surroundings(module, streaming_modules(module))
                break
    ties.stranger = None


def notice_in_graph() -> None:
    """As ``notice``, where a compiled graph runs: it knows no layers. All are noticed at once."""
    global _lease_of_graphs
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and not agreement.is_adopted(ddp):
        adopt(ddp)
    if next(_lease_of_graphs, None) is None:
        layers = [*alive([*_layers.values()])]
        _lease_of_graphs = watchdog.lease(max(1, len(layers)) * min(map(watchdog.look, layers), default=watchdog.USES))


class _AroundGraphs:
    """The actions around each use of a layer that trains in a compiled graph, see ``ops.graph.Surroundings``."""

    earlier = staticmethod(checkpoint.use_in_graph)
    notice = staticmethod(notice_in_graph)


graph.set_surroundings(_AroundGraphs())


def adopt(ddp: DistributedDataParallel) -> None:
    """Take the layers of a DistributedDataParallel model as they stand in it, in every process alike."""
    agreement.adopt(ddp)
    enroll(ddp.module)


def before_commit(listener: Listener) -> RemovableHandle:
    """Call ``listener(layers, optimizer)`` at every weight update that is noticed, just before the layers commit.

    The listener sees the short- and the long-term statistics of this update side by side, joined over the processes
    where there are several. ``layers`` are those that are about to commit; the list is empty at a step of an optimizer
    that no layer follows. ``optimizer`` is None after :func:`streamnorm.commit`. It runs in every step of training, so
    it has to be cheap. The layers commit also if it raises.

    Args:
        listener: the function.

    Returns:
        A handle, whose ``remove`` ends the calls.

    Example:
        >>> import streamnorm as sn
        >>> layer = sn.StreamingNorm1d(2)
        >>> handle = before_commit(lambda layers, optimizer: print(int(layers[0].samples), "samples"))
        >>> _ = layer(torch.randn(4, 2))
        >>> sn.commit(layer)
        4 samples
        >>> handle.remove()
    """
    handle = RemovableHandle(_listeners)
    _listeners[handle.id] = listener
    return handle


def commit(model: nn.Module) -> None:
    """Commit the statistics of ``model`` after a change of its weights: short-term ones enter the long-term ones.

    It is needed only if no ``torch.optim`` optimizer makes the update. A second call changes nothing, since nothing was
    collected in between. With several processes, all of them have to call it: their statistics are joined first.

    Args:
        model: a layer, or any module that holds some.

    Example:
        >>> import streamnorm as sn
        >>> layer = sn.StreamingNorm1d(2)
        >>> _ = layer(torch.randn(4, 2))
        >>> sn.commit(layer)
        >>> int(layer.samples)
        0
    """
    _commit(lambda: streaming_modules(model))


def bind(model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler | None = None) -> None:
    """Name the optimizer, and the GradScaler if any, of a model's streaming layers.

    It is needed in few cases. A layer commits at the steps of the optimizer that trains its network, and determines it
    by itself (docs/weight-updates.md); name the optimizer if the layer cannot, such as one that trains copies of the
    parameters. A GradScaler multiplies the loss by a number that changes, and streamed gradients have a memory: given
    the scaler, layers stream unscaled gradients, and a change of scale changes nothing.

    From then on the steps of every optimizer count that trains one of the model's parameters that ``optimizer`` trains
    now (or any parameter that it trains, if the model has none of them). So ``optimizer`` may wrap another one, or be
    replaced by a later one. A second call replaces the first.

    With several processes it also names the layers, whose order must be the same in all of them
    (:func:`streamnorm.synchronize`).

    Args:
        model: a layer, or any module that holds some.
        optimizer: the one whose step changes the weights of this model: a ``torch.optim.Optimizer``, or an object
            that holds one, as the wrappers of accelerate, Lightning and schedulefree do.
        scaler: the GradScaler of the training loop.

    Raises:
        ValueError: if the model holds no streaming layer.
        TypeError: if there is no ``torch.optim.Optimizer`` in ``optimizer``, so that its step cannot be noticed.

    Example:
        >>> import streamnorm as sn
        >>> model = nn.Sequential(nn.Linear(3, 2), sn.StreamingNorm1d(2, affine=False))
        >>> sn.bind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    """
    layers = streaming_modules(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no streaming layer to bind; call streamnorm.convert(model) first"
        )
    optimizers = optimizers_in(optimizer)
    if not optimizers:
        raise TypeError(
            f"bind takes a torch.optim.Optimizer or an object that holds one, and finds none in this "
            f"{type(optimizer).__name__}: its step() would not be noticed. Write streamnorm.commit(model) after each "
            "step() in place of bind"
        )
    if isinstance(model, DistributedDataParallel):
        adopt(model)
    else:
        enroll(model)
    held = {id(parameter): parameter for each in optimizers for parameter in parameters_of(each)}
    of_model = [parameter for parameter in model.parameters() if id(parameter) in held]
    parameters, named = Parameters(of_model or held.values()), tuple(weakref.ref(each) for each in optimizers)
    for layer in layers:
        before = layer._ties.bound
        replaced = () if before is None else (*before.optimizers, *before.replaced)
        others = tuple(each for each in replaced if all(each() is not optimizer for optimizer in optimizers))
        layer._ties.bound = Binding(parameters, named, others)
        layer._ties.grad_scale = None if scaler is None else _live_scale(scaler, layer)


def set_aside(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Let the steps of these optimizers be noticed by the layers of this model alone.

    Other layers then do not wonder whether these are updates of theirs, which those that no optimizer was seen to train
    would do after a while.
    """
    for optimizer in optimizers:
        _aside[optimizer] = model


def _live_scale(scaler: torch.amp.GradScaler, layer: Streaming) -> Tensor | None:
    """The scaler's own tensor, which it changes in place; made by the first call of ``scale``."""
    if not scaler.is_enabled():
        return None
    if scaler._scale is None:
        scaler.scale(torch.zeros((), device=layer.state.long.device))
    return scaler._scale


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Called by torch.optim before every step. Make :func:`_after_step` the first that hears of the step's end.

    Whoever averages weights and statistics, or saves them, may do it in a hook of the optimizer's own. torch.optim
    calls those before the hooks of all optimizers, and in the order in which they were registered.
    """
    if is_compiling():
        return
    hooks: Any = optimizer._optimizer_step_post_hooks
    if next(iter(hooks.values()), None) is not _after_step:
        handle = optimizer.register_step_post_hook(_after_step)
        hooks.move_to_end(handle.id, last=False)


def _after_all(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Called by torch.optim after every step: of one that had begun before the first layer was used, or is compiled."""
    if _after_step not in optimizer._optimizer_step_post_hooks.values():
        _after_step(optimizer, args, kwargs)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Commit the layers whose network this step has trained."""
    if not _layers:
        return
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and found_inf.item():
        return  # fused optimizers are called on a step that the GradScaler skips: no weight changed
    model = _aside.get(optimizer)
    _commit(_Step(optimizer).layers if model is None else lambda: streaming_modules(model), optimizer)


_trained: weakref.WeakKeyDictionary[Optimizer, Parameters] = weakref.WeakKeyDictionary()
"""The parameters that each optimizer trained at its last step."""


def optimizers_of(model: nn.Module) -> list[Optimizer]:
    """The optimizers that trained a parameter of ``model`` at their last step, as far as they still exist."""
    ids = {id(parameter) for parameter in model.parameters()}
    return [optimizer for optimizer, trained in _trained.items() if not ids.isdisjoint(trained.ids)]


PATIENCE = 128
"""After so many steps of others, which train a part of the module that a layer is called in, its own optimizer is taken
to be retired. The generator and the critic of a GAN may make 100 steps for one of the other."""


class _Step:
    """A step of an optimizer: whose weight update it was.

    An optimizer trains the network of a layer if it trains

    - a parameter that the layer's gain or bias is, or is computed from;
    - or one that was trained together with the layer at an earlier update: later stages train other parts of the
      network, while the gain may be frozen;
    - or one of the module that the layer is called in, the smallest whose weights any optimizer was seen to train.

    What counts is what an optimizer trains at its step. Whether others exist, which held the layer's parameters
    before, does not.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        parameters = parameters_of(optimizer)
        self.ids = {id(parameter) for parameter in parameters}
        record = _trained.get(optimizer)
        if record is None:
            _forget_surroundings()
        if record is None or record.ids != self.ids:
            record = _trained[optimizer] = Parameters(parameters)
        self.record = record
        self.in_backward = torch._C._current_graph_task_id() != -1
        self._modules: dict[int, tuple[bool, bool]] = {}
        self._answers: dict[int, bool | None] = {}

    def layers(self) -> list[Streaming]:
        """The layers to commit, in the order in which they became known.

        Some may be in a network that no optimizer was seen to train: without parameters of their own, or frozen as a
        whole. They follow every optimizer, but for a while not one that trains another network.
        """
        layers = [*alive([*_layers.values()])]
        for layer in layers:
            if id(layer) not in self._answers:
                self._answers[id(layer)] = self.trains(layer)
        elsewhere = any(self._answers.values())
        return [layer for layer in layers if self._follows(layer, elsewhere)]

    def _follows(self, layer: Streaming, elsewhere: bool) -> bool:
        answer, ties = self._answers[id(layer)], layer._ties
        if answer is None and ties.used:
            answer = self._answers[id(layer)] = not (elsewhere and ties.around) or _is_overdue(layer)
        return bool(answer)

    def trains(self, layer: Streaming) -> bool | None:
        """Whether this is an update of the layer's network, or None if no optimizer was seen to train that yet."""
        ties = layer._ties
        if ties.bound is not None and ties.bound.parameters.ids:
            return ties.bound.counts(self.optimizer, self.ids)
        if self.record is ties.home or self.record is ties.stranger:  # as at its last step
            answer: bool | None = self.record is ties.home
        else:
            answer = self._judge(layer)
        if answer:
            ties.passed_over = 0
        return answer

    def _judge(self, layer: Streaming) -> bool | None:
        ties = layer._ties
        is_own = owns_any(layer, self.ids)
        if ties.home is not None and not is_own:
            if self.in_backward and owns_any(layer, ties.home.ids):
                return False  # one optimizer per parameter: the turn of the gain comes within the same backward pass
            if not self.ids.isdisjoint(ties.home.ids):
                return True
        module, is_near = self._trained_around(layer)
        if not is_own:
            if module is None:
                ties.stranger = None if ties.home is None else self.record
                return None if ties.home is None else False
            if (not is_near or self._is_of_another_network(ties)) and not _is_overdue(layer):
                return False
        ties.home, ties.stranger = self.record, None
        if module is not None and self._trains_module(module)[1]:
            ties.near = weakref.ref(module)
        return True

    def _trained_around(self, layer: Streaming) -> tuple[nn.Module | None, bool]:
        """The smallest module around the layer that this trains; whether none was seen to train a smaller one."""
        near = None if layer._ties.near is None else layer._ties.near()
        is_near = True
        for module in alive(layer._ties.around):
            if self._trains_module(module)[0]:
                return module, is_near
            is_near = is_near and module is not near
        return None, False

    def _is_of_another_network(self, ties: Ties) -> bool:
        """Two networks may lie in one flat module. The layer is of that which trains the weight before it."""
        if ties.home is None or ties.before is None:
            return False
        before = ties.before()
        return before is not None and before.requires_grad and id(before) in ties.home.ids

    def _trains_module(self, module: nn.Module) -> tuple[bool, bool]:
        """Whether this trains a module at all, and whether more of it than streaming layers."""
        found = self._modules.get(id(module))
        if found is None:
            trained = [parameter for parameter in module.parameters() if id(parameter) in self.ids]
            norms = {id(parameter) for layer in streaming_modules(module) for parameter in layer.parameters()}
            found = bool(trained), any(id(parameter) not in norms for parameter in trained)
            self._modules[id(module)] = found
        return found


def _is_overdue(layer: Streaming) -> bool:
    """Count one more step of an optimizer that seems to train something else; whether there were too many of them."""
    layer._ties.passed_over += 1
    return layer._ties.passed_over > PATIENCE


def _forget_surroundings() -> None:
    """At the first step of an optimizer: a network may have become a part of another one, or its gains be computed."""
    for layer in alive([*_layers.values()]):
        layer._ties.outdated, layer._ties.lease = True, watchdog.lease(0)


@torch.no_grad()
def _commit(select: Callable[[], list[Streaming]], optimizer: Optimizer | None = None) -> None:
    layers = agreement.merged(select)
    try:
        for listener in tuple(_listeners.values()):
            listener(layers, optimizer)
    finally:
        commit_merged(layers)


def commit_merged(layers: list[Streaming]) -> None:
    """Move the short-term statistics of these layers, which are those of all processes by now, into the long-term."""
    for layer in layers:
        ties = layer._ties
        ties.committed = True
        ties.commits += 1
    if layers:
        uses = [(layer.state, layer.formula) for layer in layers]
        if not ops.tells_signs(uses[0][0]):
            runaway.look(layers)
        signs = ops.commit(uses)
        if signs:
            runaway.judge(layers, signs)
