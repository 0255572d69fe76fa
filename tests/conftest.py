import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
if "INTERP_TEST_CUDA" not in os.environ:  # the same tests on every machine; see test_cuda.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars
from hypothesis import settings

disable_progress_bars()
# the first torch call of a process takes longer than hypothesis' deadline of 200 ms
settings.register_profile("interp", deadline=None, derandomize=True)
settings.load_profile("interp")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real, tiny, pretrained Llama: weights that nobody trained for our analyses."""
    folder = ROOT.parent / "shared" / "models" / "stories260k"
    if not folder.exists():
        pytest.skip("needs ../shared/models/stories260k")
    return folder


@pytest.fixture(scope="session")
def mini_llama() -> Path:
    """Our embedded model, trained on needles, IOI, repeats and filler."""
    return ROOT / "data" / "models" / "mini-llama"
