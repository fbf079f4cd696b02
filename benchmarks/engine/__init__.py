"""What engine, scheduler and guests cost beside the driver: the grid of `python -m benchmarks.engine`, and scenarios.

`python -m benchmarks.engine.forks --help`: each scenario has a command of its own. All run on the dummy driver, which
answers without interpreting batches as a rule, so that what is measured is the host.
"""
