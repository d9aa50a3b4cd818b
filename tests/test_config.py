"""Every wrong value is refused when the configuration is made, naming the field, what came and what is
allowed.
"""

from __future__ import annotations

import dataclasses

import pytest

from lightning_uora import UORAConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", -3),
        ("rank", 2.0),
        ("rank", True),
        ("rank", "8"),
        ("init", "normal"),
        ("calibration_batches", 0),
        ("calibration_batches", 1.5),
        ("d_init", float("nan")),
        ("d_init", float("inf")),
        ("d_init", "0.1"),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", None),
        ("bias", "some"),
        ("seed", -1),
        ("seed", None),
        ("compute", "fast"),
        ("target_modules", ""),
        ("target_modules", ()),
        ("target_modules", 3),
        ("target_modules", ["qkv", 3]),
        ("exclude_modules", [""]),
        ("trainable_modules", None),
    ],
)
def test_a_wrong_value_names_the_field_and_itself(field: str, value):
    with pytest.raises(ValueError, match=f"^{field}=.*is not allowed; {field} must be ") as error:
        UORAConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_lists_become_tuples_so_that_equal_choices_are_equal():
    assert UORAConfig(target_modules=["a", "b"]) == UORAConfig(target_modules=("a", "b"))
    assert hash(UORAConfig(target_modules=["a"])) == hash(UORAConfig(target_modules=("a",)))


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UORAConfig().rank = 3
