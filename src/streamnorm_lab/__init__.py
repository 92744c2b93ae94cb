"""The laboratory behind the command ``streamnorm``: experiments, the methods of other people, benchmarks and reports.

It uses the library's public names and the engines' switch; the library never imports it. Its modules need more
packages than the layers do: ``pip install "streamnorm[experiments]"``.
"""
