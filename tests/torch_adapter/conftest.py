from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Every test of the adapter begins with the same random numbers, and computes no gradients."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        yield
