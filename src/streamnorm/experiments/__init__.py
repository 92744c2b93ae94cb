"""What the command line runs: data, networks, training, figures and reports.

These modules need more packages than the layers do: ``pip install "streamnorm[experiments]"``.
"""
