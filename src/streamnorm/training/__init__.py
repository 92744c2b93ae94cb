"""What a training loop does to layers: updates noticed, statistics joined between processes, passes recomputed."""
