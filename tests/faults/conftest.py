"""Every fault test counts its trials; `make faults` runs all of them, in full."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.trials import Trials


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("faults")


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    callspec = getattr(request.node, "callspec", None)
    made = Trials(part=callspec.params.get("part", 0) if callspec else 0)
    yield made
    request.node.user_properties.append(("trials", asdict(made)))
