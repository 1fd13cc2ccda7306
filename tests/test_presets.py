"""Presets: every file in the folder is a valid configuration that is found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextblock.config import UsageError, load_config
from nextblock.presets import find_config, preset

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "presets").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_valid_configuration(name):
    assert load_config(preset(name)).training.steps >= 1
    assert find_config(name).stem == name


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'demo'"):
        find_config("dem")
    with pytest.raises(UsageError, match="does not exist"):
        find_config("elsewhere/demo.yaml")
