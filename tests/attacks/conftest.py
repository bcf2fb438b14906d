"""The world of `scripted`."""

import pytest
from scripted import World


@pytest.fixture
def world(tok):
    return World(tok)
