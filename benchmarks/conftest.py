"""Benchmarks need a quiet machine: one process, where the tests take all cores."""


def pytest_xdist_auto_num_workers() -> int:
    return 0
