"""Measurements behind ``streamnorm bench``: time and memory beside torch.nn's own layers.

``contestants`` says what one training step of a layer, a network or a recurrent layer is, ``cases`` which of them are
compared on what, ``timing`` and ``memory`` how they are measured, ``targets`` what was asked of them. ``results``,
``tables`` and ``figures`` tell what came out; ``command`` is the command line.
"""
