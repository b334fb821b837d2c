"""Eight threads, sessions abandoned half-way, tuning beside: equal numbers, and memory stays flat.

`TREEIFY_SOAK_IMAGES` is how many images the long one answers.
"""

import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import psutil
import pytest
import small
import torch
from torch import Tensor
from torch.testing import assert_close

import treeify

THREADS, BATCH, ROUNDS = 8, 16, 10
IMAGES = int(os.environ.get("TREEIFY_SOAK_IMAGES", 1_000_000))
# What allocators keep for later by the second half of the rounds; a leak of one activation per
# session, 16 kB here, is ten times as much in the short run and a thousand times in the long one.
MEGABYTES = 8


def abandon(hne: treeify.HierarchicalEnsemble, x: Tensor, expected: Tensor, seed: int) -> int:
    """Begin a session, narrow it, compare its answers, and leave it; says how many were compared.

    Leaf logits of all images are expected, `[N, L, K]`.
    """
    order = random.Random(seed)
    session = hne.session(x)
    images, compared = torch.arange(len(x)), 0
    while not session.done and order.random() < 0.7:
        session.advance(order.randint(max(1, session.leaves), hne.leaves))
        assert_close(session.leaf_logits, expected[images, : session.leaves], rtol=1e-4, atol=1e-5)
        compared += 1
        if order.random() < 0.3 and len(images) > 1:
            chosen = torch.tensor(order.sample(range(len(images)), len(images) // 2))
            session.select(chosen)
            images = images[chosen]
    return compared


def soak(images: int) -> list[int]:
    """Answer images in rounds; the process's bytes of memory after each."""
    hne = small.ensemble()
    batches = [small.images(BATCH, seed) for seed in range(THREADS)]
    with torch.no_grad():
        expected = [hne(x) for x in batches]
    stop, memory, compared = Event(), [], 0

    def tune() -> int:
        count = 0
        while not stop.is_set():
            hne.tune(batches[0], repeats=1, budget=0.01)
            count += 1
        return count

    per_thread = max(1, images // (ROUNDS * THREADS * BATCH))

    def work(thread: int, rounds: int) -> int:
        seeds = range(rounds * per_thread, (rounds + 1) * per_thread)
        return sum(
            abandon(hne, batches[thread], expected[thread], seed * THREADS + thread)
            for seed in seeds
        )

    with ThreadPoolExecutor(THREADS + 1) as pool:
        tuning = pool.submit(tune)
        try:
            for count in range(ROUNDS):
                compared += sum(pool.map(work, range(THREADS), [count] * THREADS))
                gc.collect()
                memory.append(psutil.Process().memory_info().rss)
        finally:
            stop.set()
        assert tuning.result() > 0
    assert compared > ROUNDS * THREADS * per_thread // 2
    with torch.no_grad():
        assert_close(hne(batches[0]), expected[0], rtol=1e-4, atol=1e-5)
    return memory


def growth(memory: list[int]) -> float:
    """Megabytes from the middle round to the last, by a straight line through the second half."""
    late = torch.tensor(memory[len(memory) // 2 :], dtype=torch.double) / 1e6
    rounds = torch.arange(len(late), dtype=torch.double)
    rounds -= rounds.mean()
    slope = (rounds * late).sum() / rounds.square().sum()
    return (slope * (len(late) - 1)).item()


@pytest.mark.thorough
def test_eight_thousand_images_by_eight_threads() -> None:
    assert growth(soak(8_000)) < MEGABYTES


@pytest.mark.slow
def test_a_million_images_by_eight_threads() -> None:
    assert growth(soak(IMAGES)) < MEGABYTES


def test_growth_is_that_of_the_second_half() -> None:
    assert growth([0, 5 * 10**6, 7 * 10**6, 8 * 10**6, 9 * 10**6, 10**7]) == pytest.approx(2)
    assert growth([0, 0, 0, 5, 5, 5]) == 0
