"""Medians of runs that take turns, so that the machine's mood falls on both sides. Shared by the benchmarks."""

import statistics
import time

from tqdm.auto import tqdm


def medians(repeats: int, **work) -> dict[str, float]:
    """Median seconds of each piece of work; one warm-up run each, then `repeats` rounds that take turns."""
    for run in work.values():
        run()
    seconds = {name: [] for name in work}
    for _ in tqdm(range(repeats), desc=" against ".join(work)):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
