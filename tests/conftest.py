"""Every test runs with one thread, no network, the same random numbers and no deadline."""

from __future__ import annotations

import os

# Read when torch and huggingface_hub are first imported, so before anything else.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import gc
import random
import signal

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A script's background jobs (&) and their children ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine is slow for seconds at a time: a deadline would fail tests that are right.
# Derandomised, so that a run that passed here passes elsewhere.
settings.register_profile("modgraft", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("modgraft")


def pytest_collection_finish() -> None:
    """Leave what was imported out of every collection of garbage: an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Start every test from the same seeds, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # what libraries that use the global generator see
    torch.manual_seed(0)
