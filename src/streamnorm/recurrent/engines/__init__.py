"""Engines: what runs one layer in one direction over a mini-batch of sequences, and the choice between them.

``loop`` is the reference, a plain loop over the time steps. ``by_hand``, ``cpu`` and ``gpu`` give what it gives, with a
backward pass of their own behind the one ``autograd.Function`` of ``sequence``. ``folded`` runs all layers and
directions at once where statistics are fixed.
"""
