"""Targets set before the layers were built: the largest ratio to torch.nn's own, by case and threads."""

from __future__ import annotations

TIME_TARGETS: dict[tuple[str, str, int], float] = {
    ("layers", "(1, 128)", 1): 1.0,
    ("layers", "(1, 1024)", 1): 1.0,
    ("layers", "(8, 512)", 1): 0.85,
    ("layers", "(1, 64, 32, 32)", 1): 0.55,
    ("layers", "(1, 64, 32, 32)", 2): 0.55,
    ("layers", "(8, 64, 32, 32)", 1): 0.55,
    ("layers", "(8, 64, 32, 32)", 2): 0.55,
    ("layers", "(32, 256, 8, 8)", 1): 0.55,
    ("layers", "(32, 256, 8, 8)", 2): 0.55,
    ("layers", "(128, 64, 32, 32)", 1): 0.75,
    ("layers", "(128, 64, 32, 32)", 2): 0.70,
    ("layers", "(8, 64, 32, 32) channels_last", 1): 0.70,
    ("layers", "(8, 64, 32, 32) channels_last", 2): 0.60,
    ("layers", "(128, 64, 32, 32) channels_last", 1): 0.95,
    ("layers", "(128, 64, 32, 32) channels_last", 2): 0.75,
    ("one-pass", "(128, 64, 32, 32)", 1): 0.60,
    ("one-pass", "(128, 64, 32, 32)", 2): 0.55,
    **{
        ("recurrent", f"{kind} B{batch} H{hidden}", 1): bound
        for kind in ("GRU", "LSTM", "RNN")
        for batch, hidden, bound in ((1, 128, 0.25), (1, 512, 0.5), (32, 128, 0.75), (32, 512, 0.9))
    },
    ("compiled", "(1, 128)", 1): 1.7,
    ("compiled", "(8, 512)", 1): 1.7,
    ("compiled", "(1, 64, 32, 32)", 1): 1.3,
    ("compiled", "(8, 64, 32, 32)", 1): 1.3,
    ("compiled", "(32, 256, 8, 8)", 1): 1.3,
}
"""By suite, case and number of threads, forward plus backward, against the stock layer: ``nn.BatchNorm`` (or
``torch.batch_norm``), or the layer of ``torch.nn`` of the same name; of ``compiled``, both compiled."""

RIVAL_TARGETS: dict[tuple[str, str], float] = {
    ("layers", f"{name}{inputs}"): 1.0 for name in ("LayerNorm", "GroupNorm") for inputs in ("", ", cold inputs")
}
"""By suite and rival, for every case and number of threads: what people use where ``nn.BatchNorm`` fails."""

MEMORY_TARGETS: dict[str, float] = {"recurrent": 1.5}
"""By suite: the largest ratio of saved and of peak memory to the stock layer."""
