"""Settings of objects: the same JSON in every process, and a line for what cannot be written down."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erpd_lightning.data.settings import public_settings, settings_of
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import UserError


class Judge(Verifier):
    """Has the attributes that a test gives it."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __call__(self, responses: Any, answers: Any) -> list[float | None]:
        return [None for _ in responses]


class Client:
    """An object without settings."""


class Says:
    """Says its own settings."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def settings(self) -> Any:
        return self.given() if callable(self.given) else self.given


def test_plain_values_and_objects() -> None:
    judge = Judge(
        number=np.float32(0.5),
        count=np.int64(3),
        flag=np.bool_(True),
        path=Path("a/b"),
        pattern=re.compile("x"),
        dtype=torch.bfloat16,
        client=Client(),
        inner=Judge(a=1),
        says=Says({"b": np.int32(2), "c": (1, 2)}),
        _hidden=object(),
    )
    written = settings_of(judge)
    assert json.loads(json.dumps(written)) == written == settings_of(judge)
    assert written[0] == "Judge"
    assert written[1] == {
        "number": 0.5,
        "count": 3,
        "flag": True,
        "path": "a/b",
        "pattern": ["x", 32],
        "dtype": "torch.bfloat16",
        "client": {"class": f"{__name__}.Client"},
        "inner": {"class": f"{__name__}.Judge", "a": 1},
        "says": {"class": f"{__name__}.Says", "b": 2, "c": [1, 2]},
    }


def itself() -> Judge:
    judge = Judge()
    judge.held = judge  # type: ignore[attr-defined]
    return judge


def one_another() -> Judge:
    judge = Judge(other=Judge())
    judge.other.held = {"deep": [judge]}  # type: ignore[attr-defined]
    return judge


def list_of_itself() -> Judge:
    held: list[Any] = []
    held.append(held)
    return Judge(held=held)


def endless() -> Judge:
    says = Says(None)
    says.given = says.settings
    return Judge(held=says)


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        (itself(), r"Judge\.held is a Judge: it holds itself"),
        (one_another(), r"Judge\.held\['deep'\]\[0\] is a Judge: it holds itself"),
        (list_of_itself(), r"Judge\.held\[0\].* is a list: .*holds itself"),
        (endless(), r"Judge\.held is a Says: its method settings\(\) calls itself"),
        (Judge(weights=torch.zeros(2)), r"Judge\.weights is a Tensor: what is in it cannot be written"),
        (Judge(parts={"a": np.zeros(2)}), r"Judge\.parts\['a'\] is a ndarray"),
        (Judge(model=torch.nn.Linear(1, 1)), r"Judge\.model is a Linear"),
        (Judge(number=10**5000), r"Judge\.number is a int: it has 16610 bits"),
        (Judge(client=Says({"socket": object()})), r"Judge\.client\.settings\(\)\['socket'\] is a object"),
        (Judge(client=Says([1])), r"Judge\.client\.settings\(\) is a list: it must be a mapping"),
        (Judge(function=lambda: 0), r"Judge\.function is a function"),
    ],
)
def test_what_cannot_be_written_names_class_and_attribute(judge: Judge, told: str) -> None:
    for write in (public_settings, settings_of):
        with pytest.raises(UserError, match=f"^{told}") as error:
            write(judge)
        assert "\n" not in str(error.value)
    # Nothing is left behind of a failed attempt.
    assert settings_of(Judge(inner=Judge(a=1)))[1]["inner"]["a"] == 1


def test_an_object_may_stand_in_two_places() -> None:
    client = Client()
    assert public_settings(Judge(a=client, b=[client])) == {
        "a": {"class": f"{__name__}.Client"},
        "b": [{"class": f"{__name__}.Client"}],
    }
