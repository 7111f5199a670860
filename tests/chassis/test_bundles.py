"""What must not be loaded is refused by what its archive says of itself."""

import zipfile
from pathlib import Path

import pytest

from mojomesh_chassis.bundles import vet_mojo
from mojomesh_chassis.errors import BadBundle

SERVED = {
    "algo": "gbm",
    "category": "Binomial",
    "n_features": "14",
    "n_classes": "2",
    "n_columns": "15",
    "n_domains": "4",
    "_genmodel_encoding": "AUTO",
}


def write_mojo(path: Path, fields: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.ini", "[info]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items()))
    return path


def test_a_served_algorithm_is_let_through(tmp_path: Path) -> None:
    assert vet_mojo(write_mojo(tmp_path / "model.mojo.zip", SERVED)) == "gbm"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (
            "algo",
            "kmeans",
            "algorithm 'kmeans' is not served; served are deeplearning, drf, gbm, glm, isolationforest, stackedensemble, xg",
        ),
        ("category", "Ordinal", "model category 'Ordinal' is not served"),
        ("_genmodel_encoding", "OneHotExplicit", "categorical encoding 'OneHotExplicit' is not served"),
        ("offset_column", "exposure", "it was trained with the offset column 'exposure', which no request carries"),
        ("n_columns", "2000000000", "n_columns is '2000000000', must be a number up to 100000"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(tmp_path: Path, field: str, value: str, reason: str) -> None:
    mojo = write_mojo(tmp_path / "model.mojo.zip", SERVED | {field: value})

    with pytest.raises(BadBundle, match=reason):
        vet_mojo(mojo)


def test_what_is_no_mojo_is_refused(tmp_path: Path) -> None:
    pojo = tmp_path / "model.mojo.zip"
    pojo.write_text("public class gbm extends GenModel {}")

    with pytest.raises(BadBundle, match="POJOs are not served"):
        vet_mojo(pojo)


@pytest.mark.parametrize(
    ("place", "byte"),
    [
        (8, 99),  # packed in a way that nobody knows
        (6, 1),  # encrypted
        (14, 255),  # another checksum
        (-1, 255),  # damaged data
    ],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, place: int, byte: int) -> None:
    mojo = tmp_path / "model.mojo.zip"
    with zipfile.ZipFile(mojo, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ini", "[info]\n" + "".join(f"{name} = {value}\n" for name, value in SERVED.items()))
    content = bytearray(mojo.read_bytes())
    directory = content.index(b"PK\x01\x02")
    if place < 0:
        content[30 + len("model.ini")] = byte
    else:  # the same field is there twice: before the data, and two bytes further on in the directory at the end
        content[place] = content[directory + place + 2] = byte
    mojo.write_bytes(content)

    with pytest.raises(BadBundle, match="is not a MOJO"):
        vet_mojo(mojo)
