"""The layers in a training loop: updates noticed, statistics joined between processes, passes recomputed."""
