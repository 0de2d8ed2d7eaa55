"""Benchmarks: what `lowbit bench` measures, and what a distribution needs to bring one of its own.

A benchmark is a `Benchmark` under an entry point of the group `lowbit.bench`.
"""

from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, Shape, Use, copies, lowbits, peer, plain
from lowbit.bench.inputs import Kind, normal, sqnr

__all__ = [
    "Benchmark",
    "Case",
    "Contender",
    "Dim",
    "Given",
    "Kind",
    "Make",
    "Shape",
    "Use",
    "copies",
    "lowbits",
    "normal",
    "peer",
    "plain",
    "sqnr",
]
