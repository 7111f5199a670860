import pytest

from mojomesh_flights.dataset import Year, read_year


@pytest.fixture(scope="session")
def year() -> Year:
    return read_year()
