"""Dataset and parameter names read from reasoning-gym's source agree with the imported library."""

import dataclasses

from posttrain.rewards.gym import _config_fields, gym_datasets


def test_names_and_fields_agree_with_the_library():
    from reasoning_gym.factory import DATASETS

    found = gym_datasets()
    assert set(found) == set(DATASETS) - {"composite"}
    for name, file in found.items():
        fields = {field.name for field in dataclasses.fields(DATASETS[name][1])}
        assert _config_fields(file) == fields, name
