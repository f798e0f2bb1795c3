"""What tests of merging share."""

from pathlib import Path

import peft
import pytest

from tests.support.shipping import save_base, train_on


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base and an adapter on it: (base, adapter, tmp_path)."""
    base = save_base("llama", tmp_path / "base")
    train_on(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    return base, tmp_path / "adapter", tmp_path
